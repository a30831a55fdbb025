"""One token onto FLASH's open group, native and PyTorch, by the number of tokens in the group.

There are B sequences, with values of V channels. The figures are in docs/log/evidence.md.

    python benchmarks/flash_step.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import cumulant as cm

GROUP, KEYS = 256, 128


def in_turns(calls: list[Callable[[], object]], repeats: int = 60) -> list[float]:
    """Median microseconds of each."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            started = time.perf_counter()
            for _ in range(3):
                call()
            own.append((time.perf_counter() - started) / 3)
    return [1e6 * statistics.median(own) for own in times]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    table = Table("B", "V", "activation", "slots taken", "native µs", "PyTorch µs", "times as fast")
    bias = torch.randn(1, GROUP, GROUP)
    for rows, channels in ((1, 512), (1, 1024), (8, 512)):
        for taken in (0, 16, 100, 200, 254):
            sizes = (KEYS, KEYS, KEYS, KEYS, channels)
            context = [torch.randn(rows, 1, GROUP + taken, size) for size in sizes]
            token = [torch.randn(rows, 1, 1, size) for size in sizes]
            for activation in ("relu2", "laplace"):
                fixed = {
                    "group_size": GROUP,
                    "is_causal": True,
                    "activation": activation,
                    "bias": bias,
                }
                _, state = cm.mixed_chunk_attention(*context, **fixed, return_state=True)

                def step(impl: str, state=state, token=token, fixed=fixed) -> object:  # type: ignore[no-untyped-def]
                    return cm.mixed_chunk_attention(
                        *token, **fixed, state=state, return_state=True, impl=impl
                    )

                native, torchs = in_turns(
                    [lambda step=step: step("native"), lambda step=step: step("torch")]
                )
                times = f"{native:.0f}", f"{torchs:.0f}", f"{torchs / native:.2f}"
                table.add_row(str(rows), f"{channels:,}", activation, str(taken), *times)
    Console().print(table)


if __name__ == "__main__":
    main()
