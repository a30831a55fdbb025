"""ELiTA's attention on the native kernels.

The forward pass saves means for the backward pass. That one goes through the tokens from the last
to the first, and would need a second pass from the front to compute them.
"""

from __future__ import annotations

import torch

from ..spec import ElitaInputs, ElitaOutputs, ElitaSpec
from . import library
from .library import (
    ELITA_BLOCK,
    TYPES,
    Arguments,
    Elita,
    array_of,
    call_library,
    check_inputs,
    instruction_set_number,
    pointer_to,
    require,
    thread_count,
)

SPAN = 4096


def obstacle(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    """Why these kernels cannot run the call; empty if they can."""
    return library.obstacle(inputs.value)


def prepared(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaSpec:
    """The options with span and block."""
    return spec._replace(span=SPAN, block=ELITA_BLOCK)


def describe(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    """How the kernels would compute the call, for `explain`."""
    if inputs.value.shape[2] == 1 and inputs.past is not None:
        return "one token onto a state"
    return "a recurrence, two gates a token"


def _check_call(x: ElitaInputs, spec: ElitaSpec) -> None:
    """Check everything that the C++ relies on."""
    (B, G, T, V), H, logits = x.value.shape, x.query_logit.shape[1], x.key_logit.dtype
    check_inputs(
        key_logit=(x.key_logit, (B, G, T)),
        query_logit=(x.query_logit, (B, H, T)),
        self_logit=(x.self_logit, (B, H, T)),
        value=(x.value, (B, G, T, V)),
    )
    require(G > 0 and H % G == 0, "query_logit", f"heads that {G} divides", H)
    require(logits in (torch.float32, torch.float64), "key_logit", "fp32 or fp64", logits)
    starts = None if x.first is None else list(x.first.shape)
    require(x.first is None or starts == [T], "first", [T], starts)
    require(
        (x.log_weight is None) == (x.mean is None),
        "mean",
        "a log-sum and a mean, or neither",
        x.mean,
    )
    if x.past is not None:
        check_inputs(log_weight=(x.past[0], (B, G)), mean=(x.past[1], (B, G, V)))
    require(spec.span >= 1, "span", "at least 1", spec.span)
    require(spec.block in (0, ELITA_BLOCK), "block", f"0 or {ELITA_BLOCK}", spec.block)


class _Call(Arguments):
    """The arguments of one forward or backward call."""

    def __init__(self, x: ElitaInputs, spec: ElitaSpec):
        _check_call(x, spec)
        super().__init__(x.value.dtype)
        (B, G, T, V), H = x.value.shape, x.query_logit.shape[1]
        e = self.elita = Elita(
            B=B, H=H, G=G, T=T, V=V, span=spec.span, type=TYPES[self.dtype],
            logits=TYPES[x.key_logit.dtype], gates=TYPES[self.sums_dtype],
            threads=thread_count(B * H * T * (V + 16) * 8), isa=instruction_set_number(),
        )  # fmt: skip
        e.value = self.array_of(x.value)
        e.first = self.pointer_to(x.first, torch.bool)
        e.log_weight, e.mean = (self.pointer_to(s, torch.float64) for s in (x.log_weight, x.mean))


def forward(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    """The outputs by the C++ kernels."""
    return _run_forward(inputs, spec, spec.new_outputs(inputs))


def forward_only(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    """The outputs, with empty tensors where only the backward pass would read them."""
    y, none = spec._replace(block=0).new_outputs(inputs), inputs.value.new_empty(0)
    return _run_forward(inputs, spec._replace(block=0), y)._replace(key_odds=none, own_odds=none)


def _run_forward(inputs: ElitaInputs, spec: ElitaSpec, y: ElitaOutputs) -> ElitaOutputs:
    c = _Call(inputs, spec)
    e, logits = c.elita, (inputs.key_logit, inputs.query_logit, inputs.self_logit)
    e.out = array_of(y.out)
    if spec.block:
        y.means[:, :, inputs.value.shape[2] // spec.block :] = 0
        e.key_odds, e.own_odds = pointer_to(y.key_odds), pointer_to(y.own_odds)
        e.means = pointer_to(y.means)
    e.key_logit, e.query_logit, e.self_logit = (
        c.pointer_to(x, inputs.key_logit.dtype) for x in logits
    )
    e.final_log_weight, e.final_mean = pointer_to(y.final_log_weight), pointer_to(y.final_mean)
    call_library("cumulant_elita_forward", e)
    return y


def backward(
    upstream: ElitaOutputs, inputs: ElitaInputs, outputs: ElitaOutputs, spec: ElitaSpec
) -> ElitaInputs:
    """The inputs' gradients by the C++ kernels."""
    (B, G, T, V), H = inputs.value.shape, inputs.query_logit.shape[1]
    odds, means = (outputs.key_odds, outputs.own_odds), outputs.means
    check_inputs(
        dout=(upstream.out, (B, H, T, V)),
        key_odds=(odds[0], (B, G, T)),
        own_odds=(odds[1], (B, H, T)),
    )
    check_inputs(means=(means, (B, G, T // ELITA_BLOCK + 2, V)))
    dm, du = upstream.final_log_weight, upstream.final_mean
    for name, x, shape in (("dlog_weight", dm, (B, G)), ("dmean", du, (B, G, V))):
        if x is not None:
            check_inputs(**{name: (x, shape)})
    c, gradients = _Call(inputs, spec), spec.new_gradients(inputs, outputs)
    e, dtype = c.elita, inputs.key_logit.dtype
    dc, ds = (inputs.value.new_empty(B, heads, T, dtype=c.sums_dtype) for heads in (G, H))
    e.dout, e.dvalue = c.array_of(upstream.out), array_of(gradients.value)
    e.key_odds, e.own_odds = (c.pointer_to(x, c.sums_dtype) for x in odds)
    e.means = c.pointer_to(means, torch.float64)
    e.dkey_logit, e.dself_logit = pointer_to(dc), pointer_to(ds)
    e.dfinal_log_weight, e.dfinal_mean = (c.pointer_to(x, torch.float64) for x in (dm, du))
    if inputs.past is not None:
        e.dlog_weight, e.dmean = pointer_to(gradients.log_weight), pointer_to(gradients.mean)
    call_library("cumulant_elita_backward", e)
    ds = ds.to(dtype)
    return gradients._replace(key_logit=dc.to(dtype), query_logit=-ds, self_logit=ds)
