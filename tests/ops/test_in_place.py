"""Results may be changed in place, but not the inputs that the backward pass needs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm
from cumulant import nn
from cumulant.ops import bilinear, pointwise, project

from .cases import (
    CASES,
    CHUNK,
    IMPLEMENTATIONS,
    Case,
    assert_close,
    elita_logits,
    linear_part,
    sums_of,
)
from .walking import walk

NAMES = (
    "taylor-2",
    "linear-elu",
    "linear-softmax",
    "linear-callable",
    "gated-laplace",
    "mixed-bias",
    "elita-own",
)
SOME = [c for c in CASES if c.name in NAMES]
by_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
by_case = pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
CALLS = ("causal", "bidirectional", "masked", "packed", "one head", "one token", "half", "none")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    walk(monkeypatch, chunk=CHUNK, block=CHUNK)
    walk(monkeypatch, elita_chunk=4)


def results(case: Case, call: str, impl: str, grad: bool) -> list[Tensor]:
    """Output and sums of one kind of call."""
    T = {"one token": 1, "none": 0}.get(call, 21)
    heads = {"H": 1, "G": 1} if call in ("one head", "packed") else {}
    B = 1 if call == "packed" else 2
    dtype = torch.bfloat16 if call == "half" else torch.float32
    q, k, v = case.inputs(B, T=T, dtype=dtype, requires_grad=grad, **heads)
    options: dict[str, Any] = {"impl": impl}
    if call == "masked":
        options["key_mask"] = torch.rand(2, T) > 0.3
    if call == "packed":
        options["cu_seqlens"] = torch.tensor([0, 4, 21])
    if call == "one token":
        start = case.run(*case.inputs(B, T=9, dtype=dtype, seed=1), True, impl=impl)[1]
        options["state"] = start
    out, end = case.run(q, k, v, call != "bidirectional", **options)
    return [out, *sums_of(end)]


@by_impl
@by_case
@pytest.mark.parametrize("call", CALLS)
def test_results_can_be_changed_in_place(case: Case, impl: str, call: str):
    if call == "bidirectional" and not case.bidirectional:
        pytest.skip("causal only")
    for grad in (True, False):
        for x in results(case, call, impl, grad):
            before = x.detach().clone()
            x.add_(torch.ones(x.shape, dtype=x.dtype, requires_grad=True))
            x.mul_(2)
            torch.testing.assert_close(x.detach(), (before + 1) * 2)
    with torch.no_grad():
        kept = results(case, call, impl, False)
    for x in kept:
        x.mul_(
            torch.ones(x.shape, dtype=x.dtype, requires_grad=True)
        )  # refused for views made without gradients


@by_impl
@by_case
def test_gradients_of_results_changed_in_place(case: Case, impl: str):
    """They are right, or refused where the backward pass needs the old numbers."""
    q, k, v = case.inputs(T=21, requires_grad=True)
    exact = torch.autograd.grad(
        (case(q, k, v, is_causal=True, impl=impl) * 2).square().sum(), (q, k, v)
    )
    out = case(q, k, v, is_causal=True, impl=impl)
    out.mul_(2)
    found = gradients(out.square().sum(), (q, k, v)) or exact
    for actual, expected in zip(found, exact):
        assert_close(actual, expected, 100)


def gradients(loss: Tensor, leaves: Any) -> tuple[Tensor, ...] | None:
    """The gradients, or None if the backward pass refuses because a tensor was changed."""
    try:
        return torch.autograd.grad(loss, leaves, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


def replaced(state: cm.State, parts: list[Tensor]) -> cm.State:
    """The state with other sums."""
    given = iter(parts)
    return state.map(lambda x: next(given) if x.is_floating_point() else x)


def _without_causal(op: Any, *inputs: Tensor, is_causal: bool, **options: Any) -> Any:
    return op(*inputs, **options)


def flat_inputs(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], Any]:
    """The tensors that the operation takes, and a function that calls it with them."""
    if case.op is cm.mixed_chunk_attention:
        return [q, k, *linear_part(q, k), v], lambda *x, **o: case.op(
            *x, **case.options, **case.bias(q, 8), **o
        )
    if case.op is cm.elita_attention:
        return [*elita_logits(case, q, k), v], functools.partial(_without_causal, case.op)
    return [q, k, v], lambda *x, **o: case.op(*x, **case.options, **o)


@by_impl
@by_case
@pytest.mark.parametrize("stateful", [False, True])
def test_inputs_changed_before_the_backward_pass(case: Case, impl: str, stateful: bool):
    """Gradients are an error, or do not need the old numbers; they are never wrong."""
    inputs, call = flat_inputs(case, *case.inputs(T=21))
    options: dict[str, Any] = {"is_causal": True, "impl": impl}
    if stateful:
        options["return_state"] = True
        first = call(*inputs, **options)[1]
        names = {id(x): n for n, x in first.tensors().items() if x.is_floating_point()}
        options["state"] = first
    refused = 0
    for changed in range(len(inputs) + (len(names) if stateful else 0)):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        own = [x * 1 for x in leaves]  # may be changed in place
        past: list[Tensor] = []
        if stateful:
            starts = [
                x.clone().requires_grad_()
                for x in first.tensors().values()
                if x.is_floating_point()
            ]
            leaves += starts
            past = [x * 1 for x in starts]
            options["state"] = replaced(first, past)
        out = call(*own, **options)
        out = out[0] if stateful else out
        exact = torch.autograd.grad(
            out.square().sum(), leaves, retain_graph=True, allow_unused=True
        )
        (own + past)[changed].mul_(1.5).add_(0.1)
        found = gradients(out.square().sum(), leaves)
        refused += found is None
        for actual, expected in zip(found or (), exact):
            if expected is not None:
                assert_close(actual, expected)
    assert refused or impl == "reference"  # which works on copies


SMALL = {
    "swiglu": lambda *x: pointwise.swiglu(x[0], x[1]),
    "rms norm": lambda *x: pointwise.rms_norm(x[0], x[2][0, 0], 1e-6),
    "convolution": lambda *x: pointwise.short_convolution(x[0], x[2][0, :4]),
    "turn": lambda *x: pointwise.rotate_pairs(
        x[0].unflatten(-1, (4, -1)).transpose(1, 2), *angles(x[0])
    ),
    "project": lambda *x: project.project(x[0], x[2][0]),
    "project, turned": lambda *x: project.project(
        x[0][:1].mT, x[2][0, :256, :300].T.contiguous().T
    ),
    "bilinear": lambda *x: bilinear.bilinear(
        x[0], x[0][..., :2], x[2].flatten(1)[:, : 2 * 512].expand(8, -1)
    ),
}


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.arange(x.shape[1])[:, None] / torch.arange(1, 65)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("grad", [True, False])
def test_small_operators(name: str, grad: bool):
    """Large enough for their native kernels."""
    x = [torch.randn(2, 300, 512, requires_grad=grad) for _ in range(2)]
    weight = torch.randn(1, 512, 512, requires_grad=grad)
    out = SMALL[name](*x, weight)
    before = out.detach().clone()
    out += torch.ones_like(out).requires_grad_()
    torch.testing.assert_close(out.detach(), before + 1)
    if not grad:
        return
    leaves = [p.detach().clone().requires_grad_() for p in (*x, weight)]
    own = [p * 1 for p in leaves]
    out = SMALL[name](*own)
    used = torch.autograd.grad(out.sum(), leaves, retain_graph=True, allow_unused=True)
    own[0].add_(1)
    for actual, expected in zip(gradients(out.sum(), leaves) or used, used):
        assert expected is None or torch.equal(actual, expected)


LAYERS = {
    "linear": lambda: nn.LinearAttention(32, num_heads=2, conv_size=4, rotary=True),
    "taylor": lambda: nn.TaylorAttention(32, num_heads=2, head_dim=8),
    "elita": lambda: nn.ElitaAttention(32, num_heads=2),
    "flash": lambda: nn.MixedChunkAttention(32, query_key_dim=8, group_size=8),
    "gau": lambda: nn.GatedAttentionUnit(32, query_key_dim=8),
    "softmax": lambda: nn.SoftmaxAttention(32, num_heads=2),
    "convolution": lambda: nn.GatedShortConvolution(32),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [True, False])
def test_modules(name: str, grad: bool):
    layer = LAYERS[name]().eval()
    x = torch.randn(2, 19, 32, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        out, state = layer(x, return_state=True)
        token, after = layer(x[:, :1], state=state, return_state=True)
    for y in (out, token, *sums_of(state), *sums_of(after)):
        before = y.detach().clone()
        y.add_(1)
        torch.testing.assert_close(y.detach(), before + 1)
