"""Times of the chunk-parallel implementation by chunk length.

The table is in docs/log/foundation.md.

    python benchmarks/chunks.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import cumulant as cm
from cumulant.kernels.torch import attention


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(2)
    cases = {
        "taylor-2, B1 H16 T8192 K16 V64": (cm.taylor_attention, (1, 16, 8192), (16, 16, 64)),
        "elu + 1, B2 H8 T4096 K64 V64": (cm.linear_attention, (2, 8, 4096), (64, 64, 64)),
    }
    table = Table("case", "chunk", "forward ms", "forward + backward ms")
    for name, (op, shape, dims) in cases.items():
        plain = [torch.randn(*shape, dim) for dim in dims]
        leaves = [x.clone().requires_grad_() for x in plain]
        for chunk in (32, 64, 128, 256):
            attention.CHUNK = chunk
            forward = milliseconds(lambda: op(*plain, is_causal=True))  # noqa: B023 (called at once)
            both = milliseconds(lambda: op(*leaves, is_causal=True).sum().backward())  # noqa: B023
            table.add_row(name, str(chunk), f"{forward:.0f}", f"{both:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
