"""Products of many tokens with a matrix of 8 or 4 bits, against fp32.

    python benchmarks/quantized_products.py

For each matrix and number of tokens: fp32 as the library multiplies it, then the codes as they are
(AVX-512 VNNI), and the codes decoded to fp32 first, as on other processors. All take turns; times
are medians, and ratios say how many times as fast as fp32. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import cumulant
from cumulant.kernels.native import quantized as native
from cumulant.kernels.native.library import instruction_set_name
from cumulant.kernels.product import linear
from cumulant.ops.quantized import QuantizedMatrix, quantize

SIZES = ((2048, 768), (768, 2048), (768, 768), (32000, 768))
TOKENS = (2, 8, 16, 32, 128, 1024)
WORK = 2e9  # multiplications in all runs of one product


def decoded(matrix: QuantizedMatrix, x: torch.Tensor) -> torch.Tensor:
    with mock.patch.object(native, "has_products", return_value=False):
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("matrix", "tokens", "fp32, ms", "8 bits", "decoded", "4 bits", "decoded")
    rows = []
    for n, k in SIZES:
        weight = torch.randn(n, k)
        eight, four = quantize(weight, 8), quantize(weight, 4)
        for tokens in TOKENS:
            x = torch.randn(tokens, k)
            calls: dict[str, Callable[[], object]] = {
                "fp32": lambda x=x, w=weight: linear(x, w, None),
                "8": lambda x=x, m=eight: m.multiply(x),
                "8 decoded": lambda x=x, m=eight: decoded(m, x),
                "4": lambda x=x, m=four: m.multiply(x),
                "4 decoded": lambda x=x, m=four: decoded(m, x),
            }
            found = time_in_turns(calls, max(5, min(100, int(WORK / (n * k * tokens)))))
            rows.append({"n": n, "k": k, "tokens": tokens, **found})
            ratios = [f"{found['fp32'] / t:.2f}" for name, t in found.items() if name != "fp32"]
            table.add_row(f"{n} x {k}", str(tokens), f"{found['fp32']:.3f}", *ratios)
    Console().print(table)
    versions = {"cumulant": cumulant.__version__, "torch": torch.__version__}
    print(json.dumps({"rows": rows, **vars(options), "isa": instruction_set_name(), **versions}))


if __name__ == "__main__":
    main()
