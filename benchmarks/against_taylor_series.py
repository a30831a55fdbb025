"""Against taylor-series-linear-attention: time and memory with the same weights.

It measures attention in both directions and cross attention. Each row is one process for each
library, in turn: the median of its calls, and the peak memory of the calls beyond inputs and
weights. dim 512, 16 heads of 16, fp32.

    python benchmarks/against_taylor_series.py
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from cumulant.interop import from_taylor_series

# (queries, context or None for self attention)
SHAPES = [(1024, None), (4096, None), (16384, None), (1024, 65536)]


def measure(
    library: str, queries: int, context: int | None, backward: bool, repeats: int = 3
) -> dict[str, float]:
    from taylor_series_linear_attention import TaylorSeriesLinearAttn

    torch.manual_seed(0)
    torch.set_num_threads(2)
    module = TaylorSeriesLinearAttn(dim=512, dim_head=16, heads=16, remove_even_power_dups=True)
    if library == "cumulant":
        module = from_taylor_series(module)

    def call(x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            out = module(x) if seen is None else module(x, context=seen)
        if backward:
            out.square().mean().backward()
        return out.detach()

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    torch.manual_seed(1)
    x = torch.randn(1, queries, 512, requires_grad=backward)
    seen = None if context is None else torch.randn(1, context, 512)
    call(x[:, :64], None if seen is None else seen[:, :64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = statistics.median(timed(lambda: call(x, seen)) for _ in range(repeats))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_mib": peak, "check": float(call(x, seen).double().norm())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    results = []
    print("queries  context pass     theirs s   ours s  ratio  theirs MiB  ours MiB")
    for queries, context in SHAPES:
        for backward in (False, True):
            found = {}
            for library in ("theirs", "cumulant"):
                job = {
                    "library": library,
                    "queries": queries,
                    "context": context,
                    "backward": backward,
                }
                command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(job)]
                lines = subprocess.run(
                    command, capture_output=True, text=True, check=True
                ).stdout.splitlines()
                found[library] = json.loads(lines[-1])
            theirs, ours = found["theirs"], found["cumulant"]
            assert abs(theirs["check"] / ours["check"] - 1) < 1e-4
            results.append({"queries": queries, "context": context, "backward": backward, **found})
            print(
                f"{queries:>7,} {context or 'self':>8} {'fwd+bwd' if backward else 'forward':<8}"
                f" {theirs['seconds']:>9.3f} {ours['seconds']:>8.3f}"
                f" {theirs['seconds'] / ours['seconds']:>6.1f} {theirs['peak_mib']:>11,.0f}"
                f" {ours['peak_mib']:>9,.0f}",
                flush=True,
            )
    print(json.dumps({"torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
