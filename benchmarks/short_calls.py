"""Calls on few tokens: linear and Taylor attention, fused softmax, and onnxruntime's operator.

Each call of linear and Taylor attention, and of onnxruntime's `LinearAttention`, takes a state and
returns one. onnxruntime's has no feature map and no denominator; its columns need the packages onnx
and onnxruntime. Softmax has no such state, and reads the T tokens alone. All are measured in turns,
with pauses in which the threads of the one before come to rest. The table shows medians in
microseconds, divided by the sequences of the batch.

    python benchmarks/short_calls.py [--threads 2] [--tokens 1 16 64 128 512 4096] [--batch 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import cumulant as cm

HEADS, WIDTH, TAYLOR = 8, 64, 16
ROUNDS = 15


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


def onnx_operator(batch: int, tokens: int, rule: str, threads: int) -> Callable[[], Any]:
    """A call of onnxruntime's operator with the update rule "linear" or "gated"."""
    import onnxruntime
    from onnx import TensorProto, helper

    tokens_shape, state_shape = [batch, tokens, HEADS * WIDTH], [batch, HEADS, WIDTH, WIDTH]
    inputs = {"query": tokens_shape, "key": tokens_shape, "value": tokens_shape}
    inputs["past_state"] = state_shape
    if rule == "gated":
        inputs["decay"] = [batch, tokens, HEADS]
    outputs = {"output": tokens_shape, "present_state": state_shape}
    node = helper.make_node(
        "LinearAttention",
        list(inputs),
        list(outputs),
        domain="com.microsoft",
        q_num_heads=HEADS,
        kv_num_heads=HEADS,
        update_rule=rule,
        scale=1.0,
    )
    graph = helper.make_graph(
        [node],
        "attention",
        *(
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in part]
            for part in (inputs.items(), outputs.items())
        ),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = {name: torch.randn(shape).numpy() for name, shape in inputs.items()}
    if rule == "gated":
        x["decay"] = -abs(x["decay"])
    return lambda: session.run(None, x)


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
            time.sleep(0.01)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] / batch)
    return {name: median(seconds) * 1e6 for name, seconds in times.items()}


def all_calls(batch: int, tokens: int, threads: int) -> dict[str, Callable[[], Any]]:
    calls = {
        "elu + 1": ours(cm.linear_attention, batch, tokens, WIDTH, False),
        "elu + 1, gated": ours(cm.linear_attention, batch, tokens, WIDTH, True),
        "Taylor": ours(cm.taylor_attention, batch, tokens, TAYLOR, False),
        "softmax": softmax(batch, tokens),
    }
    if find_spec("onnxruntime") and find_spec("onnx"):
        for rule in ("linear", "gated"):
            calls[f"onnxruntime, {rule}"] = onnx_operator(batch, tokens, rule, threads)
    return calls


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 128, 512, 4096])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table("tokens", title=f"microseconds, {options.threads} threads, batch {options.batch}")
    with torch.inference_mode():
        for tokens in options.tokens:
            found = measure(all_calls(options.batch, tokens, options.threads), options.batch)
            if not table.row_count:
                for name in found:
                    table.add_column(name, justify="right")
            table.add_row(str(tokens), *(f"{time:,.1f}" for time in found.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
