"""ELiTA's attention by Triton kernels.

The tokens of a sequence are split into spans, if there are fewer sequences and heads than a GPU has
room for. With one span a sequence, one kernel reads and writes everything once, in each direction.
Otherwise a first kernel reads what each span does to a state, and a second walks over the spans
before. Backwards a fourth adds what comes through the log-sums after spans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import ElitaInputs, ElitaOutputs, ElitaSpec
from . import device

CHUNK = 32
SPAN = 512  # the fewest tokens in a span
MOST_COLUMNS = 256  # of values
BLOCK = 64  # columns of values at once


def obstacle(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    """Why these kernels cannot run the call; empty if they can."""
    if elsewhere := device.obstacle(inputs.value) or device.obstacle(inputs.key_logit):
        return elsewhere
    V = inputs.value.shape[-1]
    if not 0 < V <= MOST_COLUMNS:
        return f"its kernels take V from 1 to {MOST_COLUMNS}, not V = {V}"
    return ""


def slower(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    """Why another implementation is faster for the call; empty if none is."""
    return device.slower(inputs.value)


def prepared(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaSpec:
    """The options with chunk, span and block."""
    return spec._replace(chunk=CHUNK, span=SPAN, block=CHUNK)


def describe(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    """How the kernels would compute the call, for `explain`."""
    if inputs.value.shape[2] == 1 and inputs.past is not None:
        return "one token onto a state"
    return f"chunks of {spec.chunk} tokens, two gates a token"


def mean_form(x: ElitaInputs, chunk: int, hip: bool | None = None) -> dict[str, Any]:
    """The constants of a call's kernels, by the names of `MeanForm`."""
    (G, V), H, dtype = x.value.shape[1::2], x.query_logit.shape[1], x.value.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    block = device.power_of_two(V, BLOCK)
    options = {} if hip is None else {"hip": hip}
    return {
        "V": V, "BV": block, "BLOCKS": -(-V // block), "C": chunk, "GROUP": H // G, "SUM": exact,
        "OUT": dtype, "DOT": device.dot_type(x.value, **options),
        "FLUSHES": device.FLUSHES if hip is None else not hip, "FIRST": x.first is not None,
    }  # fmt: skip


class _Call:
    """The kernels' arguments of one call."""

    def __init__(self, x: ElitaInputs, spec: ElitaSpec):
        from . import mean_gradients, means
        from .mean_form import MeanForm

        self.kernels = {**vars(means), **vars(mean_gradients)}
        (self.B, self.G, self.T, self.V), self.H = x.value.shape, x.query_logit.shape[1]
        self.x = x
        self.form = MeanForm(*device.constants(*mean_form(x, spec.chunk).values()))
        self.first = None if x.first is None else x.first.contiguous().view(torch.uint8)
        self.value = device.with_rows(x.value)
        wanted = device.wanted_programs(x.value)
        splits = max(1, min(self.T // spec.span, -(-wanted // max(self.B * self.G, 1))))
        self.span = max(1, -(-self.T // (splits * spec.chunk))) * spec.chunk
        self.splits = max(1, -(-self.T // self.span))
        self.blocks = self.T // spec.chunk + 2
        self.state = tuple(None if s is None else s.contiguous() for s in (x.log_weight, x.mean))

    def launch(self, kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
        """Run a kernel, if it has any programs."""
        if programs:
            function = self.kernels[kernel]
            device.launch(function, programs, self.value, *arguments, form=self.form, **constants)

    def new_spans(self) -> tuple[Tensor, Tensor]:
        """A number and a vector for each span, in fp64."""
        shape = self.B * self.splits, self.G
        numbers = self.value.new_empty(shape, dtype=torch.float64)
        return numbers, self.value.new_empty((*shape, self.V), dtype=torch.float64)

    @property
    def programs(self) -> int:
        return self.B * self.G * self.splits

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.T, self.span, self.splits

    def read(self, y: ElitaOutputs, *, save: bool) -> None:
        """The outputs and the state after them."""
        x, before = self.x, self.state
        if self.splits > 1:
            before = self.new_spans()
            is_open = self.value.new_empty((self.B * self.splits, self.G), dtype=torch.int32)
            self.launch(
                "span_means", self.programs, x.key_logit, self.value, self.first, *before, is_open,
                *self.sizes, self.G, *x.key_logit.stride(), *self.value.stride()[:3],
            )  # fmt: skip
            self.launch(
                "scan_means", self.B * self.G, *before, is_open, *self.state,
                y.final_log_weight, y.final_mean, self.splits, self.G,
                HAS_BEFORE=self.state[0] is not None,
            )  # fmt: skip
        self.launch(
            "mean_outputs", self.programs, x.key_logit, x.query_logit, x.self_logit, self.value,
            self.first, *before, y.out, y.key_odds, y.own_odds, y.log_weights, y.means,
            y.final_log_weight, y.final_mean, *self.sizes, self.blocks, self.H, self.G,
            *x.key_logit.stride(), *x.query_logit.stride(), *x.self_logit.stride(),
            *self.value.stride()[:3], *y.out.stride()[:3],
            HAS_BEFORE=before[0] is not None, SAVE=save, LAST=self.splits == 1,
        )  # fmt: skip

    def step(self, y: ElitaOutputs) -> None:
        """One token onto a state."""
        x = self.x
        logits = x.key_logit, x.query_logit, x.self_logit
        strides = [s for t in (*logits, self.value, y.out) for s in t.stride()[:2]]
        self.launch(
            "mean_step", self.B * self.G, *logits, self.value, *self.state,
            y.out, y.final_log_weight, y.final_mean, self.G, *strides,
        )  # fmt: skip

    def differentiate(
        self, upstream: ElitaOutputs, y: ElitaOutputs, gradients: ElitaInputs
    ) -> tuple[Tensor, Tensor]:
        """Writes the gradients of values and of the state; those of key and self logits."""
        x, dout = self.x, device.with_rows(upstream.out)
        dm, du = (
            None if t is None else t.contiguous()
            for t in (upstream.final_log_weight, upstream.final_mean)
        )
        dc, ds = torch.empty_like(y.key_odds), torch.empty_like(y.own_odds)
        logit_strides, dout_strides = x.key_logit.stride(), dout.stride()[:3]
        sizes = *self.sizes, self.blocks
        dlog_weights, after = self.new_spans()
        passes = torch.empty_like(dlog_weights)
        if self.splits == 1:
            after = du
            if gradients.log_weight is not None:
                dlog_weights = gradients.log_weight
        else:
            self.launch(
                "mean_gradient_sums", self.programs, x.key_logit, self.first, y.log_weights,
                y.own_odds, dout, after, passes, *sizes, self.H, self.G, *logit_strides,
                *dout_strides,
            )  # fmt: skip
            self.launch(
                "scan_mean_gradients", self.B * self.G, after, passes, du, self.splits, self.G,
                HAS_LAST=du is not None,
            )  # fmt: skip
        before = x.past is not None
        self.launch(
            "mean_gradients", self.programs, x.key_logit, self.value, self.first, y.log_weights,
            y.means, y.key_odds, y.own_odds, dout, after, dm, dc, ds, gradients.value,
            dlog_weights, passes, gradients.mean, *sizes, self.H, self.G, *logit_strides,
            *self.value.stride()[:3], *dout_strides, *gradients.value.stride()[:3],
            HAS_AFTER=after is not None, HAS_LOG=dm is not None, BEFORE=before,
        )  # fmt: skip
        if self.splits > 1:
            self.launch(
                "finish_logits", self.programs, x.key_logit, self.first, y.log_weights,
                dlog_weights, passes, dc, gradients.log_weight, *sizes, self.G, *logit_strides,
                BEFORE=before,
            )  # fmt: skip
        return dc, ds


def forward(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    """The outputs by the Triton kernels."""
    y = spec.new_outputs(inputs)
    _Call(inputs, spec).read(y, save=True)
    return y


def forward_only(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    """The outputs, with empty tensors where only the backward pass would read them."""
    y, none = spec._replace(block=0).new_outputs(inputs), inputs.value.new_empty(0)
    call = _Call(inputs, spec)
    if call.T == 1 and inputs.past is not None:
        call.step(y)
    else:
        call.read(y, save=False)
    return y._replace(key_odds=none, own_odds=none)


def backward(
    upstream: ElitaOutputs, inputs: ElitaInputs, outputs: ElitaOutputs, spec: ElitaSpec
) -> ElitaInputs:
    """The inputs' gradients by the Triton kernels."""
    # what was saved may have been expanded by `torch.func.vmap`
    outputs = ElitaOutputs(*(None if t is None else t.contiguous() for t in outputs))
    gradients, dtype = spec.new_gradients(inputs, outputs), inputs.key_logit.dtype
    dc, ds = _Call(inputs, spec).differentiate(upstream, outputs, gradients)
    ds = ds.to(dtype)
    return gradients._replace(key_logit=dc.to(dtype), query_logit=-ds, self_logit=ds)
