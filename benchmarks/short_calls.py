"""Calls on few tokens: linear and Taylor attention, fused softmax, and onnxruntime's operator.

Each call of linear and Taylor attention, and of onnxruntime's `LinearAttention`, takes a state and
returns one. onnxruntime's has no feature map and no denominator; its columns need the packages onnx
and onnxruntime, as in `cumulant bench`. Its inputs and outputs are bound before the first call, so
a call copies neither. Softmax has no such state, and reads the T tokens alone. All are measured in
turns, with pauses in which the threads of the one before come to rest. The table shows medians in
microseconds, divided by the sequences of the batch.

    python benchmarks/short_calls.py [--threads 2] [--tokens 1 16 64 128 512 4096] [--batch 1]

`--gradients` measures calls without states, forwards and backwards, and `--modules` modules of 512
channels without gradients. These have no columns of onnxruntime; modules have one of PyTorch's
`nn.MultiheadAttention`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cumulant as cm
from cumulant import nn
from cumulant.bench.speed.onnxruntime_calls import linear_call, missing_packages

HEADS, WIDTH, TAYLOR = 8, 64, 16
ROUNDS = 15
REST = 0.1  # seconds; onnxruntime's threads spin for half as long after its last call


def heads(batch: int, tokens: int, *widths: int) -> list[torch.Tensor]:
    return [torch.randn(batch, HEADS, tokens, width) for width in widths]


def ours(op: Callable[..., Any], batch: int, tokens: int, width: int, gated: bool) -> Any:
    x = heads(batch, tokens, width, width, WIDTH)
    options = {"log_decay": torch.full((batch, HEADS, tokens), -0.01)} if gated else {}
    _, state = op(*x, is_causal=True, return_state=True)
    return lambda: op(*x, is_causal=True, state=state, return_state=True, **options)


def softmax(batch: int, tokens: int) -> Callable[[], Any]:
    x = heads(batch, tokens, WIDTH, WIDTH, WIDTH)
    return lambda: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True)


def onnx_operator(batch: int, tokens: int, gated: bool) -> Callable[[], Any]:
    """A call of onnxruntime's operator with the update rule "linear" or "gated"."""
    q, k, v = (torch.randn(batch, tokens, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
    state = torch.randn(batch, HEADS, WIDTH, WIDTH)
    decay = -torch.randn(batch, HEADS, tokens).abs() if gated else None
    return linear_call(q, k, v, state, log_decay=decay)


def training_calls(batch: int, tokens: int) -> dict[str, Callable[[], Any]]:
    ops = {
        "elu + 1": (cm.linear_attention, WIDTH),
        "Taylor": (cm.taylor_attention, TAYLOR),
        "softmax": (torch.nn.functional.scaled_dot_product_attention, WIDTH),
    }
    upstream = torch.ones(batch, HEADS, tokens, WIDTH)

    def call(op: Callable[..., Any], width: int) -> Callable[[], Any]:
        x = [y.requires_grad_() for y in heads(batch, tokens, width, width, WIDTH)]
        return lambda: torch.autograd.grad(op(*x, is_causal=True), x, upstream)

    return {name: call(*op) for name, op in ops.items()}


def module_calls(batch: int, tokens: int) -> dict[str, Callable[[], Any]]:
    channels = HEADS * WIDTH
    x = torch.randn(batch, tokens, channels)
    modules = {
        "elu + 1": nn.LinearAttention(channels, num_heads=HEADS, is_causal=True),
        "Taylor": nn.TaylorAttention(channels, num_heads=HEADS, is_causal=True),
        "softmax": nn.SoftmaxAttention(channels, num_heads=HEADS, is_causal=True),
    }
    other = torch.nn.MultiheadAttention(channels, HEADS, batch_first=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens)
    for module in (*modules.values(), other):
        module.eval()
    calls: dict[str, Callable[[], Any]] = {
        name: (lambda module=module: module(x)) for name, module in modules.items()
    }
    calls["PyTorch's module"] = lambda: other(
        x, x, x, need_weights=False, is_causal=True, attn_mask=mask
    )
    return calls


def measure(calls: dict[str, Callable[[], Any]], batch: int) -> dict[str, float]:
    """Median microseconds of each call and sequence, over rounds in which they take turns."""
    repeats, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(0.02 / (time.perf_counter() - start)))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(REST)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] / batch)
    return {name: median(seconds) * 1e6 for name, seconds in times.items()}


def all_calls(batch: int, tokens: int) -> dict[str, Callable[[], Any]]:
    calls = {
        "elu + 1": ours(cm.linear_attention, batch, tokens, WIDTH, False),
        "elu + 1, gated": ours(cm.linear_attention, batch, tokens, WIDTH, True),
        "Taylor": ours(cm.taylor_attention, batch, tokens, TAYLOR, False),
        "softmax": softmax(batch, tokens),
    }
    if missing_packages() is None:
        calls["onnxruntime, linear"] = onnx_operator(batch, tokens, False)
        calls["onnxruntime, gated"] = onnx_operator(batch, tokens, True)
    return calls


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 128, 512, 4096])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--gradients", action="store_true")
    what.add_argument("--modules", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table("tokens", title=f"microseconds, {options.threads} threads, batch {options.batch}")
    calls = training_calls if options.gradients else module_calls if options.modules else all_calls
    with torch.inference_mode(not options.gradients):
        for tokens in options.tokens:
            found = measure(calls(options.batch, tokens), options.batch)
            if not table.row_count:
                for name in found:
                    table.add_column(name, justify="right")
            table.add_row(str(tokens), *(f"{time:,.1f}" for time in found.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
