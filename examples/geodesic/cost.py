"""The cost of one acceleration, forwards and backwards, directly or by the Christoffel symbols.

It uses 32 points and the learned metric. It prints the median time of 20 calls, and by how much the
first call raised the peak memory of the process, so one process measures one method and size:

    OMP_NUM_THREADS=1 python examples/geodesic/cost.py 64 symbols
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

# isort: split
from geometry import Metric, acceleration, christoffel
from model import LearnedMetric
from train import peak_mib


def by_symbols(metric: Metric, x: Tensor, v: Tensor) -> Tensor:
    """``geometry.acceleration`` by the definition."""
    return -torch.einsum("nkij,ni,nj->nk", christoffel(metric, x), v, v)


WAYS = {"contraction": acceleration, "symbols": by_symbols}


def measure(
    dim: int, way: str, points: int = 32, rank: int = 4, hidden: int = 64
) -> tuple[float, float]:
    """Seconds, and MiB of peak memory."""
    torch.manual_seed(0)

    def run(metric: Metric, x: Tensor, v: Tensor) -> None:
        WAYS[way](metric, x, v).sum().backward()

    run(LearnedMetric(2, 1, 2), *torch.randn(2, 1, 2))  # PyTorch loads libraries at the first call
    metric = LearnedMetric(dim, rank, hidden)
    x, v = ((0.2 * torch.randn(points, dim)).requires_grad_() for _ in range(2))
    before = peak_mib()
    run(metric, x, v)
    grown = peak_mib() - before
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run(metric, x, v)
        times.append(time.perf_counter() - start)
    return sorted(times)[10], grown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dim", type=int)
    parser.add_argument("way", choices=WAYS)
    options = parser.parse_args()
    try:
        seconds, grown = measure(options.dim, options.way)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"D = {options.dim}, {options.way}: {1000 * seconds:.1f} ms, {grown:.0f} MiB")


if __name__ == "__main__":
    main()
