r"""A whole model here and in llama.cpp: decoding and reading a prompt, by bits and context.

    python3 -m venv LLAMA
    LLAMA/bin/pip install numpy gguf llama-cpp-python    # compiles llama.cpp for this processor
    python benchmarks/against_llama_cpp.py --llama-python LLAMA/bin/python

llama.cpp is compiled for all that the processor has. Where the system does not allow AMX, its 8
and 4 bits end with SIGILL. Then name the instruction sets before pip:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON \
    -DGGML_AVX512_BF16=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"

Models have 12 layers of width 768 with 12 heads, feed-forwards of 2,048, a vocabulary of 32,000,
tied embeddings and random weights. The preset `softmax` has a Llama's architecture: its weights are
written to GGUF files as F32, Q8_0 and Q4_0, and llama.cpp must compute the same logits from the
first. The preset `taylor` has the same sizes. Here 8 and 4 bits are those of `quantize`.

Each program and model is a process of its own, and they take turns. A round reads a prompt of the
context's length, up to the logits after it, and decodes greedily behind it. Beyond --read-once
tokens only the first round reads, and the others go on behind it. llama.cpp runs with flash
attention, and otherwise with its defaults, among them keys and values in fp16. Figures are medians,
with the interval of the rounds' medians. Memory is the most that a process has held (VmHWM), with
its libraries and mapped files. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from llama_cpp_model import peak_bytes, serve, time_tokens
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache

import cumulant
from cumulant.kernels.native.library import instruction_set_name
from cumulant.models import CumulantForCausalLM, from_preset, quantize
from cumulant.models.decoding import begin_decoding
from cumulant.text.generate import prefill

LLAMA, PRESETS = "llama.cpp", ("softmax", "taylor")
THEIRS = Path(__file__).with_name("llama_cpp_model.py")
SIZES = {"layers": 12, "width": 768, "heads": 12, "hidden": 2048, "vocabulary": 32000}
TINY = {"layers": 2, "width": 128, "heads": 2, "hidden": 352, "vocabulary": 2000}
EXACT = 1e-4  # the most that logits of the same function may differ, over their deviation
ROOM = 512  # tokens of llama.cpp's context beyond the prompt


@dataclass(frozen=True)
class Goal:
    """A model's times over llama.cpp's at the same bits should be at least `ratio`."""

    preset: str
    work: str
    ratio: float
    contexts: tuple[int, ...] | None = None  # None: every one
    bits: tuple[int, ...] = (32, 8, 4)

    def holds_for(self, bits: int, context: int) -> bool:
        return bits in self.bits and (self.contexts is None or context in self.contexts)


GOALS = (
    Goal("taylor", "decode", 1.0, (128,)),
    Goal("taylor", "decode", 2.0, (8192,)),
    Goal("taylor", "decode", 5.0, (32768,)),
    Goal("softmax", "decode", 0.9, bits=(32,)),
    Goal("taylor", "prompt", 1.5, (128,)),
    Goal("taylor", "prompt", 4.0, (8192,)),
)


# our side


def build(preset: str, sizes: dict[str, int]) -> CumulantForCausalLM:
    torch.manual_seed(0)
    config = from_preset(
        preset,
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["hidden"],
    )
    model = CumulantForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # not all ones, so that each has its place
                parameter.uniform_(0.5, 1.5)
    return model


def gguf_weights(model: CumulantForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of a softmax model by GGUF's names for a Llama. Both rotate neighbours."""
    found = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
    }
    for i, layer in enumerate(model.model.layers):
        mixer, fed = layer.mixer, layer.feed_forward
        parts = {
            "attn_norm": layer.mixer_norm,
            "attn_q": mixer.q_proj,
            "attn_k": mixer.k_proj,
            "attn_v": mixer.v_proj,
            "attn_output": mixer.out_proj,
            "ffn_norm": layer.feed_forward_norm,
            "ffn_gate": fed.gate_proj,
            "ffn_up": fed.up_proj,
            "ffn_down": fed.out_proj,
        }
        found |= {f"blk.{i}.{name}": part.weight for name, part in parts.items()}
    assert sum(x.numel() for x in found.values()) == sum(p.numel() for p in model.parameters())
    return {f"{name}.weight": weight.detach() for name, weight in found.items()}


def export(folder: Path, sizes: dict[str, int], all_bits: list[int]) -> None:
    """Our models of these bits, and the softmax model's weights for llama.cpp."""
    for preset in PRESETS:
        for bits in all_bits:
            model = build(preset, sizes)
            made = model if bits == 32 else quantize(model, bits)
            made.save_pretrained(folder / f"{preset}-{bits}")
    model = build("softmax", sizes)
    weights = {name: x.numpy() for name, x in gguf_weights(model).items()}
    np.savez(folder / "weights.npz", **weights)
    more = {"eps": model.config.norm_eps, "rotary_base": model.config.rotary_base}
    (folder / "sizes.json").write_text(json.dumps({**sizes, **more}), encoding="utf-8")


class Ours:
    """One of our models, with the same commands as llama.cpp's."""

    def __init__(self, path: str, threads: int):
        torch.set_num_threads(threads)
        self.model = CumulantForCausalLM.from_pretrained(path).eval()
        self.cache: DynamicCache = DynamicCache(config=self.model.config)
        self.token = torch.zeros(1, dtype=torch.long)

    def read(self, tokens: list[int]) -> torch.Tensor:
        """The logits after these tokens, which follow those before."""
        ids = torch.tensor([tokens])
        prefill(self.model, ids[:, :-1], self.cache)
        return self.model(input_ids=ids[:, -1:], past_key_values=self.cache, use_cache=True).logits[
            0, -1
        ]

    def prompt(self, tokens: list[int]) -> float:
        self.cache = DynamicCache(config=self.model.config)
        started = time.perf_counter()
        self.token = self.read(tokens).argmax(-1, keepdim=True)
        return time.perf_counter() - started

    def decode(self, count: int) -> list[float]:
        decoder = begin_decoding(self.model, self.cache, None)

        def step() -> None:
            self.token = decoder.step(self.token).argmax(-1)

        try:
            return time_tokens(step, count)
        finally:
            decoder.close()

    def logits(self, tokens: list[int]) -> list[list[float]]:
        self.cache = DynamicCache(config=self.model.config)
        half = len(tokens) // 2
        parts = [tokens[:half], *([token] for token in tokens[half:])]
        return [self.read(part).tolist() for part in parts]


def serve_ours(argument: str) -> None:
    with torch.inference_mode():
        ours = Ours(**json.loads(argument))
        serve(
            {
                "prompt": ours.prompt,
                "decode": ours.decode,
                "logits": ours.logits,
                "memory": peak_bytes,
            }
        )


# the comparison


class Child:
    """A process that answers commands. An error of it is a `RuntimeError` with its last lines."""

    def __init__(self, command: list[str]):
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see `close`)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            ended = signal.Signals(-code).name if code < 0 else str(code)
            self.errors.seek(0)
            last = " / ".join(self.errors.read().strip().splitlines()[-2:])
            raise RuntimeError(f"it ended with {ended}: {last}")
        return json.loads(line)

    def ask(self, name: str, argument: Any = None) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([name, argument]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def start(options: argparse.Namespace, program: str, bits: int, room: int, exact: bool) -> Child:
    """The process of a program (llama.cpp, or one of our presets) with a model of these bits."""
    folder = Path(options.folder)
    if program == LLAMA:
        argument: dict[str, Any] = {"path": str(folder / f"{bits}.gguf"), "context": room}
        argument |= {"threads": options.threads, "exact": exact}
        command = [options.llama_python, str(THEIRS), "serve", json.dumps(argument)]
    else:
        argument = {"path": str(folder / f"{program}-{bits}"), "threads": options.threads}
        command = [sys.executable, __file__, "--serve", json.dumps(argument)]
    return Child(command)


@contextmanager
def stage(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """A line of progress while something runs; yields a function that sets its detail."""
    if not console.is_terminal:
        console.print(title)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(title)
        yield lambda detail: progress.update(task, description=f"{title}: {detail}")


def logits_of(
    options: argparse.Namespace, program: str, bits: int, tokens: list[int], exact: bool = False
) -> torch.Tensor:
    """A program's logits after the first half of the tokens and after each of the others."""
    child = start(options, program, bits, ROOM, exact)
    try:
        child.answer()
        return torch.tensor(child.ask("logits", tokens), dtype=torch.float64)
    finally:
        child.close()


def differences(options: argparse.Namespace, console: Console) -> dict[str, float]:
    """The greatest distance of logits from our fp32 softmax model's, over their deviation.

    "exact" is llama.cpp with attention in fp32. The others are as they are measured.
    """
    tokens = torch.randint(options.sizes["vocabulary"], (40,)).tolist()
    with stage(console, "logits") as show:
        show("softmax, 32 bits")
        wanted = logits_of(options, "softmax", 32, tokens)
        found = {"exact": logits_of(options, LLAMA, 32, tokens, exact=True)}
        for bits in options.bits:
            for program in ("softmax", LLAMA):
                name = f"{program}, {bits} bits"
                show(name)
                try:
                    found[name] = logits_of(options, program, bits, tokens)
                except RuntimeError as error:
                    console.print(f"{name}: {error}", markup=False)
    return {name: float((x - wanted).abs().max() / wanted.std()) for name, x in found.items()}


def measure(
    options: argparse.Namespace, bits: int, context: int, show: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each program, all with a model of these bits and a context of this length."""
    tokens = torch.randint(options.sizes["vocabulary"], (context,)).tolist()
    rows: dict[str, dict[str, Any]] = {
        program: {"program": program, "bits": bits, "context": context, "decode": [], "prompt": []}
        for program in (LLAMA, *options.presets)
    }
    with ExitStack() as stack:
        children = {}
        for program in rows:
            children[program] = start(options, program, bits, context + ROOM, exact=False)
            stack.callback(children[program].close)
        for round_ in range(-1, options.rounds):
            for program, row in rows.items():
                if "error" in row:
                    continue
                show(f"{program}, {'start' if round_ < 0 else f'round {round_ + 1}'}")
                try:
                    if round_ < 0:
                        children[program].answer()
                        children[program].ask("prompt", tokens[:64])  # warms up
                        continue
                    if round_ == 0 or context <= options.read_once:
                        row["prompt"].append(children[program].ask("prompt", tokens))
                    row["decode"].append(median(children[program].ask("decode", options.tokens)))
                    row["peak_bytes"] = children[program].ask("memory")
                except RuntimeError as error:
                    row["error"] = str(error)
    return list(rows.values())


def speed(row: dict[str, Any], work: str) -> str:
    """Tokens/s of the median of the rounds, or nothing."""
    if not row[work]:
        return "–"
    tokens = row["context"] if work == "prompt" else 1
    return f"{tokens / median(row[work]):,.0f}"


def ratio_to(row: dict[str, Any], other: dict[str, Any], work: str) -> tuple[float, float, float]:
    """The least, middle and greatest quotient of the other's time and the row's."""
    own, their = row[work], other[work]
    return min(their) / max(own), median(their) / median(own), max(their) / min(own)


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal at each bits and context that was measured."""
    found = []
    by_name = {(row["program"], row["bits"], row["context"]): row for row in rows}
    for goal in GOALS:
        for (program, bits, context), row in by_name.items():
            other = by_name[LLAMA, bits, context]
            if program != goal.preset or not goal.holds_for(bits, context):
                continue
            if not row[goal.work] or not other[goal.work]:
                continue
            low, middle, high = ratio_to(row, other, goal.work)
            verdict = "reached" if low >= goal.ratio else "missed"
            if low < goal.ratio <= high:
                verdict = "cannot tell"
            found.append(
                {
                    "preset": program, "work": goal.work, "bits": bits, "context": context,
                    "goal": goal.ratio, "ratio": [low, middle, high], "verdict": verdict,
                }
            )  # fmt: skip
    return found


def print_results(
    rows: list[dict[str, Any]], goals: list[dict[str, Any]], console: Console
) -> None:
    table = Table(
        "bits", "context", "program", "tokens/s", "ratio", "prompt, tokens/s", "ratio", "MiB"
    )
    theirs = {(row["bits"], row["context"]): row for row in rows if row["program"] == LLAMA}
    for row in rows:
        other = theirs[row["bits"], row["context"]]
        cells = []
        for work in ("decode", "prompt"):
            known = row is not other and row[work] and other[work]
            low, middle, high = ratio_to(row, other, work) if known else (0.0, 0.0, 0.0)
            cells += [speed(row, work), f"{middle:.2f} ({low:.2f} to {high:.2f})" if known else ""]
        memory = f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else "–"
        table.add_row(
            str(row["bits"]), f"{row['context']:,}", row["program"], *cells, memory,
            end_section=row is rows[-1] or row["program"] == rows[-1]["program"],
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if "error" in row:
            where = f"{row['program']}, {row['bits']} bits, context {row['context']:,}"
            console.print(f"{where}: {row['error']}", markup=False)
    for goal in goals:
        low, middle, high = goal["ratio"]
        console.print(
            f"{goal['verdict']}: {goal['preset']} {goal['work']}, {goal['bits']} bits, context"
            f" {goal['context']:,}: {middle:.2f} times llama.cpp's speed ({low:.2f} to {high:.2f});"
            f" the goal is {goal['goal']}"
        )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-python", default=sys.executable, help="with llama-cpp-python")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 8192, 32768])
    parser.add_argument("--bits", type=int, nargs="+", choices=(32, 8, 4), default=[32, 8, 4])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a round")
    parser.add_argument("--read-once", type=int, default=8192, help="longest prompt of all rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="keeps the models here, or finds them there")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a try, no evidence")
    options = parser.parse_args()
    options.sizes = TINY if options.quick else SIZES
    if options.quick:
        options.contexts, options.rounds = [128, 1024], 2
    if (options.tokens + 4) * options.rounds + 1 > ROOM:
        parser.error(f"rounds, tokens: together at most {ROOM - 1} tokens, with 4 more a round")
    needed = "import gguf, llama_cpp, numpy"
    if subprocess.run(
        [options.llama_python, "-c", needed], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        parser.error(
            f"llama-python: {options.llama_python} cannot {needed}; install them with"
            " pip install numpy gguf llama-cpp-python, and name that environment's python"
        )
    return options


def prepare(options: argparse.Namespace, console: Console) -> None:
    """The models of both programs, unless the folder has them."""
    folder = Path(options.folder)
    done, bits = folder / "done.json", {32, *options.bits}
    if done.is_file():
        made = json.loads(done.read_text(encoding="utf-8"))
        if made["sizes"] != options.sizes:
            raise SystemExit(f"folder: {folder} has models of other sizes; name another")
        if bits <= set(made["bits"]):
            return
    folder.mkdir(parents=True, exist_ok=True)
    with stage(console, "models") as show:
        show("ours")
        export(folder, options.sizes, sorted(bits))
        show("GGUF files")
        subprocess.run([options.llama_python, str(THEIRS), "write", str(folder)], check=True)
    done.write_text(json.dumps({"sizes": options.sizes, "bits": sorted(bits)}), encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve_ours(sys.argv[2])
        return
    options, console = read_options(), Console(width=110)
    with ExitStack() as stack:
        if options.folder is None:
            options.folder = stack.enter_context(tempfile.TemporaryDirectory())
        prepare(options, console)
        torch.manual_seed(0)
        apart = differences(options, console)
        same = apart["exact"] <= EXACT
        console.print(
            f"llama.cpp computes {'the same function as' if same else 'ANOTHER function than'} the"
            f" preset softmax: with attention in fp32 its logits differ by {apart['exact']:.1e} of"
            " their deviation. As they are measured: "
            + "; ".join(f"{n} {x:.1e}" for n, x in apart.items() if n != "exact")
        )
        if not same:
            raise SystemExit("nothing was measured")
        rows: list[dict[str, Any]] = []
        for bits in options.bits:
            for context in sorted(options.contexts):
                with stage(console, f"{bits} bits, context {context:,}") as show:
                    rows += measure(options, bits, context, show)
        child = start(options, LLAMA, options.bits[0], ROOM, exact=False)
        stack.callback(child.close)
        child.answer()
        facts = child.ask("facts")
    goals = judge(rows)
    print_results(rows, goals, console)
    if options.quick:
        console.print("This was a try with a tiny model. It is no evidence.")
    versions = {"cumulant": cumulant.__version__, "torch": torch.__version__}
    chosen = {n: x for n, x in vars(options).items() if n not in ("llama_python", "folder")}
    results = {"rows": rows, "goals": goals, "logits": apart, **chosen, **versions, **facts}
    print(json.dumps({**results, "isa": instruction_set_name()}))


if __name__ == "__main__":
    main()
