"""ELiTA's attention in ONNX: the running log-sum and mean of `cumulant.ElitaState`, in fp64."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..nn import ElitaAttention
from .graph import GraphBuilder, Value
from .layers import cast, positions, project, reshape, split, squeeze, unsqueeze


def emit_elita(b: GraphBuilder, mixer: nn.Module, x: Value) -> Value:
    """``[B, T, D]`` -> ``[B, T, D]``."""
    assert isinstance(mixer, ElitaAttention)
    if mixer.relative:
        raise b.refuse("with horizon=None positions depend on tokens that follow")
    H, V = mixer.num_heads, mixer.head_dim
    content = project(b, x, mixer.logit_proj)  # [B, T, 2 H or 3 H]
    k1, s, *k3 = split(b, content, *[H] * (mixer.logit_proj.out_features // H))
    key, query = (_position_logits(b, mixer, name) for name in ("1", "2"))
    c, r = b.op("Add", k1, key), b.op("Add", k3[0], query) if k3 else query
    if mixer.clip is not None:
        bounds = [b.constant(sign * mixer.clip, "float32") for sign in (-1, 1)]
        c, r, s = (b.op("Clip", logit, *bounds) for logit in (c, r, s))
    v = reshape(b, project(b, x, mixer.v_proj), 0, 0, H, V)
    wide = [cast(b, x, "float64") for x in (c, r, s, v)]
    out = reshape(b, _attend(b, H, V, wide), 0, 0, H * V)
    return project(b, out, mixer.out_proj)


def _position_logits(b: GraphBuilder, mixer: Any, number: str) -> Value:
    """P₁ or P₂, ``[T, H]``."""
    logits = mixer.position

    def make_times() -> Value:
        place = cast(b, positions(b), "float64")
        time = b.op("Mul", place, b.constant(float(logits.time), "float64"))
        time = b.op("Div", time, b.constant(float(logits.horizon), "float64"))
        return unsqueeze(b, cast(b, time, "float32"), 1, 2)  # [T, 1, 1]

    times = b.once(("times", logits.time, logits.horizon), make_times)
    angle = b.op("Mul", times, b.weight(getattr(logits, f"a{number}")))
    angle = b.op("Add", angle, b.weight(getattr(logits, f"b{number}")))
    sines = b.op("Mul", b.op("Sin", angle), b.weight(logits.c))
    return b.op("ReduceSum", sines, b.constant([-1]), keepdims=0)


def _attend(b: GraphBuilder, H: int, V: int, tokens: list[Value]) -> Value:
    """``[B, T, H, V]`` in fp32, from c, r, s ``[B, T, H]`` and v ``[B, T, H, V]`` in fp64."""
    c, r, s, v = tokens
    log_weight = b.past("log_weight", ("B", H), "float64", initial=-math.inf)
    mean = b.past("mean", ("B", H, V), "float64")

    def add_key(m: Value, u: Value, c: Value, v: Value) -> list[Value]:
        """One key joins the log-sum ``[B, H]`` and the mean ``[B, H, V]``."""
        apart = b.op("Sub", b.op("Min", m, c), b.op("Max", m, c))
        one = b.constant(1.0, "float64")
        new = b.op("Add", b.op("Max", m, c), b.op("Log", b.op("Add", b.op("Exp", apart), one)))
        share = unsqueeze(b, b.op("Exp", b.op("Sub", c, new)), -1)
        return [new, b.op("Add", u, b.op("Mul", share, b.op("Sub", v, u)))]

    if b.step:
        end = add_key(log_weight, mean, squeeze(b, c, 1), squeeze(b, v, 1))
        every = [unsqueeze(b, x, 1) for x in end]
    else:
        names = [b.new_name(f"token.{part}") for part in ("m", "u", "c", "v")]
        body = b.body(
            [(name, "float64") for name in names],
            ["float64"] * 4,
            lambda m, u, c, v: [*(new := add_key(m, u, c, v)), *(b.op("Identity", x) for x in new)],
        )
        found = b.ops(
            "Scan",
            4,
            log_weight,
            mean,
            c,
            v,
            body=body,
            num_scan_inputs=2,
            scan_input_axes=[1, 1],
            scan_output_axes=[1, 1],
        )
        end, every = found[:2], found[2:]
    b.present(log_weight, end[0])
    b.present(mean, end[1])
    gate = b.op("Sigmoid", b.op("Sub", b.op("Sub", s, r), every[0]))
    apart = b.op("Mul", unsqueeze(b, gate, -1), b.op("Sub", v, every[1]))
    return cast(b, b.op("Add", every[1], apart), "float32")
