"""A Llama in llama.cpp: writes its GGUF files, and runs one of them on commands.

`against_llama_cpp.py` starts this file with an interpreter that has llama-cpp-python, gguf and
numpy. It imports nothing of Cumulant and needs no torch.

    python benchmarks/llama_cpp_model.py write FOLDER       # weights.npz to 32.gguf, 8.gguf, 4.gguf
    python benchmarks/llama_cpp_model.py serve JSON         # commands on standard input
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {32: "F32", 8: "Q8_0", 4: "Q4_0"}  # of matrices, by bits; norms are fp32


def serve(commands: dict[str, Callable[[Any], Any]]) -> None:
    """Answer each line ``[name, argument]`` of standard input with a line of JSON."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, argument = json.loads(line)
        print(json.dumps(commands[name](argument)), flush=True)


def peak_bytes(_: None = None) -> int:
    """The most memory that this process has held, mapped files included (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def time_tokens(step: Callable[[], Any], count: int, warm_up: int = 4) -> list[float]:
    """Seconds of each of `count` steps, after some that are not counted."""
    times = []
    for _ in range(warm_up + count):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return times[warm_up:]


def add_vocabulary(file: Any, sizes: dict[str, Any]) -> None:
    """None, or with sizes["texts"] a token for each byte and others that no text has."""
    count = sizes["vocabulary"]
    file.add_vocab_size(count)
    if not sizes.get("texts"):
        file.add_tokenizer_model("no_vocab")
        return
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>", "<s>", "</s>"]
    tokens += [f"<{i}>" for i in range(len(tokens), count)]
    types = [6] * 256 + [2, 3, 3] + [5] * (count - 259)  # bytes, unknown, control, unused
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens)
    file.add_token_scores([0.0] * count)
    file.add_token_types(types)
    file.add_unk_token_id(256)
    file.add_bos_token_id(257)
    file.add_eos_token_id(258)
    file.add_add_space_prefix(False)


def write(folder: Path) -> None:
    """The files of ``weights.npz``, whose names are GGUF's, with the sizes in ``sizes.json``."""
    import gguf

    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    weights = np.load(folder / "weights.npz", allow_pickle=False)
    for bits, name in TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        temporary = folder / f"{bits}.gguf.tmp"
        file = gguf.GGUFWriter(temporary, "llama")
        add_vocabulary(file, sizes)
        file.add_context_length(1 << 20)
        file.add_embedding_length(sizes["width"])
        file.add_block_count(sizes["layers"])
        file.add_feed_forward_length(sizes["hidden"])
        file.add_head_count(sizes["heads"])
        file.add_head_count_kv(sizes["heads"])
        file.add_layer_norm_rms_eps(sizes["eps"])
        file.add_rope_dimension_count(sizes["width"] // sizes["heads"])
        file.add_rope_freq_base(sizes["rotary_base"])
        file.add_file_type(gguf.LlamaFileType[f"MOSTLY_{name}" if bits < 32 else "ALL_F32"])
        for tensor in weights.files:
            x = weights[tensor]
            if x.ndim == 2 and bits < 32:
                file.add_tensor(tensor, gguf.quantize(x, kind), raw_dtype=kind)
            else:
                file.add_tensor(tensor, x)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        temporary.rename(folder / f"{bits}.gguf")


class Llama:
    """One file and one context, by llama.cpp's own functions.

    path: the file. context: tokens that it has room for. threads: of everything. exact: attention
    in fp32. Otherwise it is flash attention, with keys and values in fp16.
    """

    def __init__(self, path: str, context: int, threads: int, exact: bool):
        import llama_cpp

        self.api = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda *_: None)  # kept, as C calls it
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise ValueError(f"{path}: llama.cpp does not load this file")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if exact:
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
        self.batch = options.n_batch
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {context} tokens")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.token = 0

    def read(self, tokens: list[int]) -> np.ndarray:
        """The logits after these tokens, which follow those before."""
        for start in range(0, len(tokens), self.batch):
            part = tokens[start : start + self.batch]
            array = (self.api.llama_token * len(part))(*part)
            failed = self.api.llama_decode(
                self.context, self.api.llama_batch_get_one(array, len(part))
            )
            if failed:
                raise RuntimeError(f"llama_decode returned {failed}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
        )

    def prompt(self, tokens: list[int]) -> float:
        """Seconds of reading a prompt into an empty context, with the logits after it."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        started = time.perf_counter()
        self.token = int(self.read(tokens).argmax())
        return time.perf_counter() - started

    def decode(self, count: int) -> list[float]:
        """Seconds of each of `count` tokens that follow, greedily."""

        def step() -> None:
            self.token = int(self.read([self.token]).argmax())

        return time_tokens(step, count)

    def logits(self, tokens: list[int]) -> list[list[float]]:
        """After the first half of the tokens, read at once, and after each of the others."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        half = len(tokens) // 2
        parts = [tokens[:half], *([token] for token in tokens[half:])]
        return [self.read(part).tolist() for part in parts]


def main() -> None:
    role, argument = sys.argv[1:]
    if role == "write":
        write(Path(argument))
        return
    import llama_cpp

    llama = Llama(**json.loads(argument))
    facts = {
        "llama-cpp-python": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    serve(
        {
            "prompt": llama.prompt,
            "decode": llama.decode,
            "logits": llama.logits,
            "memory": peak_bytes,
            "facts": lambda _: facts,
        }
    )


if __name__ == "__main__":
    main()
