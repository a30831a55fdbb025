"""Mechanisms trained on one text under one budget: loss, time a step, memory and state, side by side."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, set_seed

from ..models import CumulantConfig, CumulantForCausalLM, cache_bytes
from ..text.corpus import load_corpus
from ..text.options import TrainingOptions
from ..text.runs import STARTED
from ..text.tokenizer import load_tokenizer, train_bpe
from ..text.tokens import tokenize
from ..text.train import train
from .recipes import RECIPES, Comparison, Mechanism, configuration

Run = dict[str, Any]  # a run's result.json, with its mechanism and seed


@dataclass(frozen=True)
class Cost:
    """Of one training step on the CPU: seconds (median) and bytes kept for the backward pass; of decoding: bytes of
    state after `context` tokens."""

    seconds: float
    kept_bytes: int
    state_bytes: int


def compare(
    recipe: str,
    data: str,
    output: str,
    *,
    mechanisms: list[str],
    seeds: int | None,
    epochs: float | None,
    heldout: float,
    device: str,
    console: Console,
) -> None:
    """Train every mechanism from every seed, measure a step of each, and leave everything in `output`.

    A comparison that was interrupted goes on where it stopped: finished runs are kept, the last is resumed.
    """
    from .plots import draw_curves, pyplot

    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    chosen = RECIPES[recipe].chosen(mechanisms)
    chosen = replace(
        chosen,
        seeds=chosen.seeds if seeds is None else seeds,
        epochs=chosen.epochs if epochs is None else epochs,
    )
    if chosen.seeds < 1 or not 0 < chosen.epochs < math.inf:
        raise ValueError(f"seeds: expected at least 1 seed and epochs above 0, got {seeds} and {epochs}")
    pyplot()  # refuses at once, not after training
    folder = Path(output)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    steps = _prepare(chosen, folder, data, heldout, say)
    size = len(load_tokenizer(folder))
    configs = {m.name: configuration(chosen, m, size) for m in chosen.mechanisms}
    runs = []
    for seed in range(chosen.seeds):
        for mechanism in chosen.mechanisms:
            config = configs[mechanism.name]
            found = _train(chosen, mechanism, config, seed, steps, folder, data, heldout, device, say)
            runs.append({"mechanism": mechanism.name, "seed": seed, **found})
    costs = measure(configs, chosen)
    rows = summary(runs, costs, chosen.baseline)
    _write(folder / "compare.json", json.dumps(_record(recipe, chosen, data, steps, runs, costs, configs), indent=2))
    _write(folder / "table.md", markdown(rows))
    draw_curves(runs, folder)
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    say(f"{folder}: compare.json, table.md, curves.png, curves.svg, and a folder for each run")


def _prepare(recipe: Comparison, folder: Path, data: str, heldout: float, say: Callable[[str], None]) -> int:
    """The tokenizer that all runs use, left in `folder`, and how many steps the epochs are."""
    corpus = load_corpus(data, heldout=heldout)
    settings = {"digest": corpus.digest, "vocabulary": recipe.vocabulary, "heldout": heldout}
    note, tokenizer = folder / "text.json", None
    if note.is_file():
        started = json.loads(note.read_text())
        if {name: started.get(name) for name in settings} != settings:
            raise ValueError(f"output: {folder} holds a comparison on another text; name another folder")
        tokens = int(started["tokens"])
    else:
        begun = {"tokenizer.json", "tokenizer_config.json"}  # all there is if the first start was cut short
        if folder.exists() and {path.name for path in folder.iterdir()} - begun:
            raise ValueError(f"output: {folder} holds something else; name another folder")
        tokenizer = train_bpe(corpus.train, recipe.vocabulary)
        tokens = len(tokenize(corpus.train, tokenizer).ids)
    steps = int(recipe.epochs * ((tokens - 1) // recipe.context) / recipe.batch)
    if steps < 1:
        raise ValueError(
            f"data: {tokens:,} tokens are not one step of {recipe.batch} x {recipe.context}; pass more text"
        )
    if tokenizer is not None:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        _write(note, json.dumps({**settings, "tokens": tokens}))
    kept, held = corpus.sizes
    say(
        f"{corpus.name}: {kept:,} bytes, {tokens:,} tokens to train on, {held:,} bytes held out; "
        f"{recipe.epochs:g} epochs are {steps} steps of {recipe.batch} x {recipe.context} tokens"
    )
    return steps


def _train(
    recipe: Comparison,
    mechanism: Mechanism,
    config: CumulantConfig,
    seed: int,
    steps: int,
    folder: Path,
    data: str,
    heldout: float,
    device: str,
    say: Callable[[str], None],
) -> Run:
    """One run, or what it came to if it has been done."""
    output = folder / f"{mechanism.name.replace(', ', '-').replace(' ', '-')}-{seed}"
    fields = {**recipe.shared, **mechanism.fields}
    options = TrainingOptions(
        str(output),
        data=data,
        heldout=heldout,
        tokenizer=str(folder),
        preset=mechanism.preset,
        model_option=[f"{name}={json.dumps(value)}" for name, value in fields.items()],
        width=recipe.width,
        depth=recipe.depth,
        heads=recipe.heads,
        intermediate=config.intermediate_size,
        context=recipe.context,
        batch=recipe.batch,
        disjoint=True,
        steps=steps,
        learning_rate=recipe.learning_rate,
        schedule=recipe.schedule,
        adam_beta2=recipe.adam_beta2,
        weight_decay=recipe.weight_decay,
        evaluate_every=max(1, steps // 10),
        seed=seed,
        device=device,
    )
    if (output / STARTED).is_file():
        started = json.loads((output / STARTED).read_text())
        # which text and which tokenizer, `_prepare` has made sure of, wherever they lie now
        places = ("output", "device", "data", "tokenizer")
        other = [n for n, v in asdict(options).items() if n not in places and started.get(n) != v]
        if other:
            raise ValueError(f"output: {output} was run with another {other[0]}; name another folder")
        options = replace(options, data=started["data"], tokenizer=started["tokenizer"], resume=True)
    if not (output / "result.json").is_file():
        say(f"{mechanism.name}, seed {seed}")
        train(options, say=lambda line: say(f"  {line}"))
    found: Run = json.loads((output / "result.json").read_text())
    return found


def measure(configs: dict[str, CumulantConfig], recipe: Comparison, rounds: int = 5) -> dict[str, Cost]:
    """A training step of every mechanism on the CPU, one after another, `rounds` times over: medians, so that what else
    runs on the machine meets all alike."""
    set_seed(0)
    ids = torch.randint(recipe.vocabulary, (recipe.batch, recipe.context + 1))
    models = {name: CumulantForCausalLM(config).train() for name, config in configs.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append(time.perf_counter() - start)
    return {
        name: Cost(statistics.median(times[name][1:]), _kept_bytes(model, ids), _state_bytes(model, recipe.context))
        for name, model in models.items()
    }


def _kept_bytes(model: CumulantForCausalLM, ids: torch.Tensor) -> int:
    """Bytes of all tensors that a step keeps for its backward pass, the weights aside."""
    found: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss
    return sum(size for where, size in found.items() if where not in own)


@torch.inference_mode()
def _state_bytes(model: CumulantForCausalLM, context: int) -> int:
    cache = DynamicCache(config=model.config)
    model.eval()(torch.zeros(1, context, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


HEADINGS = ("mechanism", "nats per token", "less baseline", "CPU s/step", "kept, MiB", "state, kB")


def summary(runs: list[Run], costs: dict[str, Cost], baseline: str) -> list[tuple[str, ...]]:
    """A row for each mechanism: held-out loss at the end of training, mean and deviation over seeds; its difference
    from the baseline's run of the same seed; seconds of a step, bytes that a step keeps for its backward pass, both
    also over the baseline's; bytes of state."""
    base = {r["seed"]: final(r) for r in runs if r["mechanism"] == baseline}
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(r["mechanism"] for r in runs):
        own = [r for r in runs if r["mechanism"] == name]
        cost, first = costs[name], costs[baseline]
        rows.append(
            (
                name,
                _spread([final(r) for r in own]),
                "" if name == baseline else _spread([final(r) - base[r["seed"]] for r in own], sign=True),
                f"{cost.seconds:.2f} ({cost.seconds / first.seconds:.2f}x)",
                f"{cost.kept_bytes / 2**20:,.0f} ({cost.kept_bytes / first.kept_bytes:.2f}x)",
                f"{cost.state_bytes / 1000:,.1f}",
            )
        )
    return rows


def final(run: Run) -> float:
    """Nats per token of the held-out text after the last step."""
    return float(run["heldout_losses"][-1][1])


def _spread(values: list[float], *, sign: bool = False) -> str:
    """Mean and sample deviation."""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _record(
    name: str,
    recipe: Comparison,
    data: str,
    steps: int,
    runs: list[Run],
    costs: dict[str, Cost],
    configs: dict[str, CumulantConfig],
) -> dict[str, Any]:
    return {
        "recipe": name,
        "settings": asdict(recipe),
        "data": Path(data).name,
        "steps": steps,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "intermediate_size": {name: config.intermediate_size for name, config in configs.items()},
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "runs": runs,
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
