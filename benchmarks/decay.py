"""Native attention with log decays against the same call without, in turns, on one thread.

Times are of the thread's CPU, so that other programs change them little. Ratios are medians of
the rounds' ratios.

    python benchmarks/decay.py [--tokens 8192] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cumulant as cm

HEADS = 8
# name, operation, query/key dim, value dim, key/value heads
CASES: tuple[tuple[str, Callable[..., Any], int, int, int], ...] = (
    ("Taylor 2, K = 16, V = 64", cm.taylor_attention, 16, 64, 8),
    ("Taylor 2, K = 16, V = 64, 2 key/value heads", cm.taylor_attention, 16, 64, 2),
    ("elu + 1, K = 64, V = 64", cm.linear_attention, 64, 64, 8),
    ("elu + 1, K = 16, V = 64", cm.linear_attention, 16, 64, 8),
)


def draw(tokens: int, K: int, V: int, groups: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as projections lay them out, and log decays."""
    torch.manual_seed(0)
    sizes = (HEADS, K), (groups, K), (groups, V)
    inputs = [torch.randn(1, tokens, *size).transpose(1, 2) * 0.5 for size in sizes]
    return inputs, -0.01 * torch.rand(1, tokens, groups).mT


def seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def compare(op: Callable[..., Any], inputs: list[Tensor], logs: Tensor, work: str, rounds: int):
    """Median seconds without decays, and the median ratio with them."""
    leaves = [x.clone().requires_grad_(work == "gradients") for x in inputs]
    decays = logs.clone().requires_grad_(work == "gradients")
    start = op(*leaves, is_causal=True, impl="native", return_state=True)[1]

    def call(log_decay: Tensor | None) -> None:
        given = {"is_causal": True, "impl": "native", "log_decay": log_decay}
        if work == "step":
            token = [x[:, :, :1] for x in leaves]
            one = None if log_decay is None else log_decay[:, :, :1]
            for _ in range(200):
                op(*token, **{**given, "log_decay": one}, state=start, return_state=True)
            return
        out = op(*leaves, **given)
        if work == "gradients":
            wanted = leaves if log_decay is None else [*leaves, log_decay]
            torch.autograd.grad(out, wanted, torch.ones_like(out))

    plain, ratios = [], []
    for i in range(rounds + 2):
        without, with_decays = seconds(lambda: call(None)), seconds(lambda: call(decays))
        if i >= 2:
            plain.append(without / (200 if work == "step" else 1))
            ratios.append(with_decays / without)
    return statistics.median(plain), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| call | work | without decays | with, relative |\n|---|---|---|---|")
    for name, op, K, V, groups in CASES:
        inputs, logs = draw(given.tokens, K, V, groups)
        for work in ("forward", "gradients", "step"):
            plain, ratio = compare(op, inputs, logs, work, given.rounds)
            print(f"| {name} | {work} | {plain * 1e3:.3g} ms | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
