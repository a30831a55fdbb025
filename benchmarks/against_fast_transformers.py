"""Against pytorch-fast-transformers, which must be installed and compiled: forward and backward.

Both have the same weights. Rows are medians of five calls each, in turn, in one process. dim 512,
8 heads of 64, batch 1, fp32, two threads.

    python benchmarks/against_fast_transformers.py
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from fast_transformers.attention import AttentionLayer, CausalLinearAttention, LinearAttention
from fast_transformers.masking import LengthMask

from cumulant.interop import from_fast_transformers


def seconds(call: Callable[[], torch.Tensor], backward: bool) -> float:
    def once() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            out = call()
        if backward:
            out.sum().backward()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(5))


def main() -> None:
    torch.set_num_threads(2)
    results = []
    print("attention               tokens pass     theirs s  ours s  ratio")
    for kind in (CausalLinearAttention, LinearAttention):
        theirs = AttentionLayer(kind(64), 512, 8)
        ours = from_fast_transformers(theirs)
        causal = kind is CausalLinearAttention
        mask = SimpleNamespace(
            lower_triangular=causal, all_ones=not causal
        )  # without its T x T matrix
        for length in (1024, 4096, 16384):
            x, lengths = torch.randn(1, length, 512), LengthMask(torch.tensor([length]))
            torch.testing.assert_close(
                ours(x), theirs(x, x, x, mask, lengths, lengths), rtol=1e-4, atol=1e-5
            )
            for backward in (False, True):
                a = seconds(lambda: theirs(x, x, x, mask, lengths, lengths), backward)  # noqa: B023
                b = seconds(lambda: ours(x), backward)  # noqa: B023
                name = "fwd+bwd" if backward else "forward"
                results.append(
                    {
                        "attention": kind.__name__,
                        "tokens": length,
                        "pass": name,
                        "theirs": a,
                        "ours": b,
                    }
                )
                print(
                    f"{kind.__name__:<22} {length:>7,} {name:<8} {a:>8.3f} {b:>7.3f} {a / b:>6.2f}",
                    flush=True,
                )
    print(json.dumps({"torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
