"""A whole model in 32, 16 (bf16), 8 and 4 bits: decoding, and reading a prompt.

    python benchmarks/quantized.py

All take turns, and figures are medians with the middle half of the tokens. Weights are
random: 12 layers of width 768 with a vocabulary of 32,000. Decoding is the loop of `generate`,
greedy, on two threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import cumulant
from cumulant.kernels.native.library import instruction_set_name
from cumulant.models import CumulantForCausalLM, from_preset, quantize
from cumulant.models.decoding import argmax, begin_decoding
from cumulant.text.generate import fill_cache, prefill


def build(preset: str, bits: int) -> CumulantForCausalLM:
    torch.manual_seed(0)
    config = from_preset(
        preset,
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=2048,
    )
    model = CumulantForCausalLM(config).eval()
    if bits >= 16:
        return model if bits == 32 else model.bfloat16()
    return quantize(model, bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="taylor")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {bits: build(arguments.preset, bits) for bits in (32, 16, 8, 4)}
    tokens: dict[int, list[float]] = {bits: [] for bits in models}
    prompts: dict[int, list[float]] = {bits: [] for bits in models}
    prompt = torch.randint(32000, (1, arguments.context))
    with torch.inference_mode():
        for model in models.values():
            prefill(model, prompt, DynamicCache(config=model.config))  # warms up
        for _ in range(arguments.rounds):
            for bits, model in models.items():
                cache = DynamicCache(config=model.config)
                started = time.perf_counter()
                prefill(model, prompt, cache)
                prompts[bits].append(time.perf_counter() - started)
            for bits, model in models.items():
                decoder = begin_decoding(model, fill_cache(model, arguments.context), None)
                token = torch.zeros(1, dtype=torch.long)
                for step in range(14):
                    started = time.perf_counter()
                    token = argmax(decoder.step(token))
                    if step > 3:
                        tokens[bits].append(time.perf_counter() - started)
    rows = {}
    table = Table("weights", "MiB", "a token, ms", "tokens/s", "ratio", "prompt, ms", "ratio")
    for bits, model in models.items():
        low, median, high = (q * 1e3 for q in statistics.quantiles(tokens[bits], n=4))
        read = statistics.median(prompts[bits]) * 1e3
        size = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
        rows[bits] = {"token": [low, median, high], "prompt": read, "bytes": size}
        table.add_row(
            f"{bits} bits",
            f"{size / 2**20:.0f}",
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            f"{1e3 / median:.0f}",
            f"{rows[32]['token'][1] / median:.2f}",
            f"{read:.0f}",
            f"{rows[32]['prompt'] / read:.2f}",
        )
    Console().print(table)
    versions = {"cumulant": cumulant.__version__, "torch": torch.__version__}
    print(json.dumps({"rows": rows, **vars(arguments), "isa": instruction_set_name(), **versions}))


if __name__ == "__main__":
    main()
