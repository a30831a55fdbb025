"""Products of many tokens with a matrix of 8 or 4 bits, against fp32.

    python benchmarks/quantized_products.py [--isa avx512vnni avx512]

For each matrix and number of tokens: fp32 as the library multiplies it, then the codes with each
instruction set. All take turns; times are medians, and ratios say how many times as fast as fp32.
To compare AVX2 with fp32 of such a processor, set MKL_ENABLE_INSTRUCTIONS=AVX2 too. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import cumulant
from cumulant.kernels.native import library
from cumulant.kernels.product import linear
from cumulant.ops.quantized import QuantizedMatrix, quantize

SIZES = ((2048, 768), (768, 2048), (768, 768), (32000, 768))
TOKENS = (2, 8, 16, 32, 128, 1024)
WORK = 2e9  # multiplications in all runs of one product


def multiply(matrix: QuantizedMatrix, x: torch.Tensor, isa: str) -> torch.Tensor:
    library.instruction_set_name = lambda: isa
    return matrix.multiply(x)


def time_in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if i > 1:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", nargs="+", default=[library.instruction_set_name()])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = [(bits, isa) for bits in (8, 4) for isa in options.isa]
    table = Table("matrix", "tokens", "fp32, ms", *(f"{bits} bits, {isa}" for bits, isa in kinds))
    rows = []
    for n, k in SIZES:
        weight = torch.randn(n, k)
        matrices = {bits: quantize(weight, bits) for bits in (8, 4)}
        for tokens in TOKENS:
            x = torch.randn(tokens, k)
            calls: dict[str, Callable[[], object]] = {
                "fp32": lambda x=x, w=weight: linear(x, w, None),
                **{
                    f"{bits} {isa}": lambda x=x, m=matrices[bits], i=isa: multiply(m, x, i)
                    for bits, isa in kinds
                },
            }
            found = time_in_turns(calls, max(5, min(100, int(WORK / (n * k * tokens)))))
            rows.append({"n": n, "k": k, "tokens": tokens, **found})
            ratios = [f"{found['fp32'] / t:.2f}" for name, t in found.items() if name != "fp32"]
            table.add_row(f"{n} x {k}", str(tokens), f"{found['fp32']:.3f}", *ratios)
    Console().print(table)
    versions = {"cumulant": cumulant.__version__, "torch": torch.__version__}
    print(json.dumps({"rows": rows, **vars(options), **versions}))


if __name__ == "__main__":
    main()
