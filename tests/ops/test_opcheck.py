"""Every operator's schema, fake kernel, registration and AOT dispatch, for any strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm
from cumulant.kernels.bilinear import bilinear, bilinear_backward
from cumulant.kernels.operators import attention, elita, gated, mixed_chunk
from cumulant.kernels.operators.operator import Operator
from cumulant.kernels.spec import (
    AttentionInputs,
    AttentionSpec,
    ElitaInputs,
    ElitaSpec,
    GatedInputs,
    GatedSpec,
    MixedChunkInputs,
    MixedChunkSpec,
)

from .cases import CASES, CHUNK, by_fast_impl, elita_logits, linear_part

pytestmark = pytest.mark.usefixtures("short_chunks")
LAYOUTS = (
    "plain",
    "heads inside tokens",
    "strided",
    "expanded",
    "empty batch",
    "no tokens",
    "grouped",
    "half",
    "one token",
    "one strided token",
)
QUICK = ("strided", "expanded")


def check(operator: Operator[Any, Any, Any], *call: Any) -> None:
    """Schema, fake kernels, autograd and AOT dispatch agree with the implementation."""
    torch.library.opcheck(operator.forward, operator.forward_arguments(*call))


def tensor(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers of this shape, with the strides that `layout` names; a leaf."""
    if layout == "half":
        dtype = torch.bfloat16 if dtype == torch.float64 else dtype
    layout = layout.replace("one strided token", "strided")
    if layout == "expanded":
        x = torch.randn(
            *shape[:1], *(1 if n > 1 else n for n in shape[1:-1]), shape[-1], dtype=dtype
        ).expand(shape)
    elif layout == "strided":
        x = torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype)[..., 1::2]
        x = x.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "heads inside tokens" and len(shape) > 2:
        x = torch.randn(shape[0], shape[2], shape[1], *shape[3:], dtype=dtype).transpose(1, 2)
    else:
        x = torch.randn(shape, dtype=dtype)
    return x.detach().requires_grad_()


def sizes(layout: str) -> tuple[int, int, int, int]:
    """B, H, G and T."""
    return (
        0 if layout == "empty batch" else 2,
        4 if layout == "grouped" else 2,
        2,
        {"no tokens": 0, "one token": 1, "one strided token": 1}.get(layout, 20),
    )


def sums_dtype(layout: str) -> torch.dtype:
    return torch.float32 if layout == "half" else torch.float64


def attention_call(layout: str, is_causal: bool) -> tuple[Any, ...]:
    (B, H, G, T), K, V = sizes(layout), 5, 3
    q, k, v = (tensor((B, n, T, d), layout) for n, d in ((H, K), (G, K), (G, V)))
    wide = "plain" if layout == "half" else layout
    S = tensor((B, G, K, V), wide, sums_dtype(layout))
    Z = tensor((B, G, K), wide, sums_dtype(layout)).detach().abs().add(1).requires_grad_()
    mask = torch.rand(T, B).gt(0.3).T
    spec = AttentionSpec(0, True, "elu", 0.5, True, is_causal, True, chunk=CHUNK, span=CHUNK)
    return AttentionInputs(q, k, v, mask, None, S, Z), spec


def mixed_call(layout: str, is_causal: bool) -> tuple[Any, ...]:
    (B, H, G, T), K, L, V, g = sizes(layout), 5, 4, 3, 8
    five = [tensor((B, n, T, d), layout) for n, d in ((H, K), (G, K), (H, L), (G, L), (G, V))]
    bias = tensor((H, g, g), "plain" if layout == "half" else layout)
    past: tuple[Any, ...] = (None,) * 5
    if is_causal:
        shapes = ((B, G, L, V), (B, G, g, K), (B, G, g, L), (B, G, g, V))
        position = torch.arange(3, 3 + B)
        past = (
            *(
                tensor(x, "plain" if layout == "half" else layout, sums_dtype(layout))
                for x in shapes
            ),
            position,
        )
    spec = MixedChunkSpec(g, "laplace", is_causal, True, 0.0, is_causal, span=8)
    return MixedChunkInputs(*five, bias, None, None, *past), spec


def elita_call(layout: str, _: bool) -> tuple[Any, ...]:
    (B, H, G, T), V = sizes(layout), 3
    wide = "plain" if layout == "half" else layout
    three = [tensor((B, n, T), wide, sums_dtype(layout)) for n in (G, H, H)]
    past = tensor((B, G), "plain"), tensor((B, G, V), wide)
    spec = ElitaSpec(span=4, block=16)
    return ElitaInputs(*three, tensor((B, G, T, V), layout), None, *past), spec


def torch_elita_call(layout: str, _: bool) -> tuple[Any, ...]:
    inputs, spec = elita_call(layout, _)
    return inputs, spec._replace(chunk=4, block=0)


def gated_call(layout: str, is_causal: bool) -> tuple[Any, ...]:
    B, H, G, T = sizes(layout)
    q, k, v = (tensor((B, n, T, d), layout) for n, d in ((H, 5), (G, 5), (G, 3)))
    bias, scale = tensor((B, H, T, T), layout), torch.rand(B, T, dtype=sums_dtype(layout))
    return GatedInputs(q, k, v, scale, bias), GatedSpec("laplace", is_causal, 0.0, block=8)


# of operations, by implementation
OPERATORS: dict[str, tuple[Operator[Any, Any, Any], str, Callable[..., Any]]] = {
    "torch": (attention.OPERATOR, "torch", attention_call),
    "native": (attention.OPERATOR, "native", attention_call),
    "mixed torch": (mixed_chunk.OPERATOR, "torch", mixed_call),
    "mixed native": (mixed_chunk.OPERATOR, "native", mixed_call),
    "elita torch": (elita.OPERATOR, "torch", torch_elita_call),
    "elita native": (elita.OPERATOR, "native", elita_call),
    "gated": (gated.OPERATOR, "torch", gated_call),
}


def all_rows() -> list[Any]:
    return [
        pytest.param(name, layout, marks=() if layout in QUICK else pytest.mark.slow)
        for name in OPERATORS
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("name", "layout"), all_rows())
@pytest.mark.filterwarnings("ignore")
def test_operators_are_what_they_promise(name: str, layout: str):
    for is_causal in (True, False):
        operator, impl, arguments = OPERATORS[name]
        inputs, spec = arguments(layout, is_causal)
        check(operator, impl, inputs, spec)
        with torch.no_grad():
            inputs = type(inputs)(*(x if x is None else x.detach() for x in inputs))
            found = operator.forward(*operator.forward_arguments(impl, inputs, spec))
            outputs = operator.outputs(*(found if isinstance(found, tuple) else (found,)))
            first, *rest = outputs
            upstream = (
                torch.randn_like(first),
                *(torch.randn_like(x) if x.numel() else None for x in rest),
            )
            call = operator.backward_arguments(
                impl, operator.outputs(*upstream), inputs, outputs, spec
            )
            torch.library.opcheck(operator.backward, call)


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in LAYOUTS]
)
@pytest.mark.filterwarnings("ignore")
def test_bilinear_operators_are_what_they_promise(layout: str):
    rows = 0 if layout in ("empty batch", "no tokens") else 6
    inputs = tensor((rows, 3), layout), tensor((rows, 2), layout), tensor((4, 6), layout)
    torch.library.opcheck(bilinear, inputs)
    with torch.no_grad():
        a, b, weight = (x.detach() for x in inputs)
        torch.library.opcheck(
            bilinear_backward, (torch.randn_like(bilinear(a, b, weight)), a, b, weight)
        )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("length", [7, 20], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("states", ["in and out", "out", "none", "packed"])
@by_fast_impl
def test_opcheck(is_causal, normalize, length, states, impl):
    """They agree, also in which states are empty."""
    q, k, v = CASES[1].inputs(1, T=length, requires_grad=True)
    S = (
        torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
        if states == "in and out"
        else None
    )
    Z = (
        torch.rand(1, 2, 5, dtype=torch.float64, requires_grad=True)
        if S is not None and normalize
        else None
    )
    mask = torch.rand(1, length) > 0.3
    bounds = torch.tensor([0, 3, length]) if states == "packed" else None
    wanted = states in ("in and out", "out")
    inputs = AttentionInputs(q, k, v, mask, bounds, S, Z)
    spec = AttentionSpec(
        0, True, "elu", 0.5, normalize, is_causal, wanted or (impl != "torch" and not is_causal)
    )
    check(attention.OPERATOR, impl, inputs, spec._replace(chunk=CHUNK, span=CHUNK))


@pytest.mark.parametrize("order", [0, 2])
def test_heads_lie_inside_tokens(order):
    """Splitting a projection into heads, and joining outputs again, copies nothing."""
    x = [torch.randn(2, 70, heads * 6) for heads in (4, 2, 2)]
    q, k, v = (part.unflatten(-1, (-1, 6)).transpose(1, 2).requires_grad_() for part in x)
    spec = AttentionSpec(order, True, "elu", 0.5, True, True, False, chunk=32, span=32)
    check(attention.OPERATOR, "native", AttentionInputs(q, k, v), spec)
    out = (
        cm.taylor_attention(q, k, v, is_causal=True)
        if order
        else cm.linear_attention(q, k, v, is_causal=True)
    )
    assert out.transpose(1, 2).is_contiguous()
    for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 20], ids=["a token", "one group", "several groups"])
@pytest.mark.parametrize("states", ["in and out", "out", "none", "packed"])
@by_fast_impl
def test_opcheck_mixed_chunks(is_causal, length, states, impl):
    if states in ("in and out", "out") and not is_causal:
        pytest.skip("no state")
    q, k, v = CASES[1].inputs(1, T=length, requires_grad=True)
    lin_q, lin_k = (x.detach().requires_grad_() for x in linear_part(q, k))
    bias = torch.randn(4, 8, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, length) > 0.3 if states == "out" else None
    bounds = torch.tensor([0, length // 2, length]) if states == "packed" else None
    past = [None] * 5
    if states == "in and out":
        _, start = cm.mixed_chunk_attention(
            *(x.detach()[:, :, :1].repeat(1, 1, 11, 1) for x in (q, k, lin_q, lin_k, v)),
            group_size=8,
            is_causal=True,
            return_state=True,
        )
        past = [
            x.requires_grad_() if x.is_floating_point() else x for x in start.tensors().values()
        ]
    spec = MixedChunkSpec(
        8, "laplace", is_causal, True, 0.0, states in ("in and out", "out"), span=8
    )
    check(
        mixed_chunk.OPERATOR,
        impl,
        MixedChunkInputs(q, k, lin_q, lin_k, v, bias, mask, bounds, *past),
        spec,
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_opcheck_gated(is_causal, packed):
    q, k, v = CASES[1].inputs(1, T=20, requires_grad=True)
    bias = torch.randn(1, 4, 20, 20, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 3, 20]) if packed else None
    scale = torch.rand(1, 20, dtype=torch.float64)
    inputs = GatedInputs(q, k, v, scale, bias, bounds)
    check(gated.OPERATOR, "torch", inputs, GatedSpec("laplace", is_causal, 0.0, block=8))


@pytest.mark.parametrize("length", [0, 1, 7, 37])
@pytest.mark.parametrize("states", ["in", "none", "packed"])
@by_fast_impl
def test_opcheck_elita(length, states, impl):
    case = next(c for c in CASES if c.name == "elita-own")
    q, k, v = case.inputs(1, T=length, requires_grad=True)
    logits = [x.detach().requires_grad_() for x in elita_logits(case, q, k)]
    first = torch.rand(length) > 0.7 if states == "packed" else None
    m = torch.randn(1, 2, dtype=torch.float64, requires_grad=True) if states == "in" else None
    u = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) if states == "in" else None
    spec = {
        "torch": ElitaSpec(chunk=4),
        "native": ElitaSpec(span=4, block=16),
        "triton": ElitaSpec(chunk=16, span=16, block=16),
    }[impl]
    check(elita.OPERATOR, impl, ElitaInputs(*logits, v, first, m, u), spec)
