"""Cases in which the native kernels are slower than PyTorch's quadratic form.

    python benchmarks/thresholds.py

They have few tokens with many features. A row is one layer's Taylor attention with 8 heads and
V = 64: native time over PyTorch's, medians of runs in turns.
`cumulant.kernels.native.attention.MANY` rests on it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

import cumulant as cm

KERNELS = ((16, 2), (32, 2), (16, 3), (64, 2), (24, 3), (16, 4))  # K, order


def ratio(K: int, order: int, T: int, is_causal: bool, backward: bool, repeats: int) -> float:
    """Native time over PyTorch's."""
    inputs = [torch.randn(1, 8, T, size, requires_grad=backward) for size in (K, K, 64)]
    times: dict[str, list[float]] = {"native": [], "torch": []}
    for _ in range(repeats + 2):
        for impl, found in times.items():
            started = time.perf_counter()
            out = cm.taylor_attention(*inputs, order, is_causal=is_causal, impl=impl)
            if backward:
                torch.autograd.grad(out.sum(), inputs)
            found.append(time.perf_counter() - started)
    native, other = (statistics.median(found[2:]) for found in times.values())
    return native / other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table, rows = (
        Table("directions", "tokens", "K", "order", "features", "forward", "with backward"),
        [],
    )
    for is_causal, lengths in ((True, (100, 128)), (False, (16, 64, 128))):
        for T in lengths:
            for K, order in KERNELS:
                both = [
                    ratio(K, order, T, is_causal, backward, arguments.repeats)
                    for backward in (False, True)
                ]
                rows.append(
                    [
                        "causal" if is_causal else "both",
                        T,
                        K,
                        order,
                        cm.feature_count(K, order),
                        *both,
                    ]
                )
                table.add_row(
                    *(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in rows[-1])
                )
    Console().print(table)
    print(json.dumps({"rows": rows, "threads": arguments.threads, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
