"""Every operator against its schema, its fake kernel, its registration and AOT dispatch, however
its inputs lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cumulant.kernels.bilinear import bilinear, bilinear_backward
from cumulant.kernels.operators import attention as attention_operator
from cumulant.kernels.operators import elita as elita_operator
from cumulant.kernels.operators import gated as gated_operator
from cumulant.kernels.operators import mixed_chunk as mixed_chunk_operator
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

from .cases import CHUNK

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


def tensor(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of this shape, in memory as `layout` says; a leaf that asks for gradients."""
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
    """B, H, G, T."""
    return (
        0 if layout == "empty batch" else 2,
        4 if layout == "grouped" else 2,
        2,
        {"no tokens": 0, "one token": 1, "one strided token": 1}.get(layout, 20),
    )


def sums_dtype(layout: str) -> torch.dtype:
    return torch.float32 if layout == "half" else torch.float64


def attention(layout: str, is_causal: bool) -> tuple[Any, ...]:
    (B, H, G, T), K, V = sizes(layout), 5, 3
    q, k, v = (tensor((B, n, T, d), layout) for n, d in ((H, K), (G, K), (G, V)))
    wide = "plain" if layout == "half" else layout
    S = tensor((B, G, K, V), wide, sums_dtype(layout))
    Z = tensor((B, G, K), wide, sums_dtype(layout)).detach().abs().add(1).requires_grad_()
    mask = torch.rand(T, B).gt(0.3).T
    spec = AttentionSpec(0, True, "elu", 0.5, True, is_causal, True, chunk=CHUNK, span=CHUNK)
    return AttentionInputs(q, k, v, mask, None, S, Z), spec


def mixed(layout: str, is_causal: bool) -> tuple[Any, ...]:
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


def logits(layout: str, _: bool) -> tuple[Any, ...]:
    (B, H, G, T), V = sizes(layout), 3
    wide = "plain" if layout == "half" else layout
    three = [tensor((B, n, T), wide, sums_dtype(layout)) for n in (G, H, H)]
    past = tensor((B, G), "plain"), tensor((B, G, V), wide)
    spec = ElitaSpec(chunk=4, span=4, block=16)
    return ElitaInputs(*three, tensor((B, G, T, V), layout), None, *past), spec


def torch_logits(layout: str, _: bool) -> tuple[Any, ...]:
    inputs, spec = logits(layout, _)
    return inputs, replace(spec, block=0)


def gates(layout: str, is_causal: bool) -> tuple[Any, ...]:
    B, H, G, T = sizes(layout)
    q, k, v = (tensor((B, n, T, d), layout) for n, d in ((H, 5), (G, 5), (G, 3)))
    bias, scale = tensor((B, H, T, T), layout), torch.rand(B, T, dtype=sums_dtype(layout))
    return GatedInputs(q, k, v, scale, bias), GatedSpec("laplace", is_causal, 0.0, block=8)


# of operations, by implementation
OPERATORS: dict[str, tuple[Operator[Any, Any, Any], str, Callable[..., Any]]] = {
    "torch": (attention_operator.OPERATOR, "torch", attention),
    "native": (attention_operator.OPERATOR, "native", attention),
    "mixed torch": (mixed_chunk_operator.OPERATOR, "torch", mixed),
    "mixed native": (mixed_chunk_operator.OPERATOR, "native", mixed),
    "elita torch": (elita_operator.OPERATOR, "torch", torch_logits),
    "elita native": (elita_operator.OPERATOR, "native", logits),
    "gated": (gated_operator.OPERATOR, "torch", gates),
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
        torch.library.opcheck(operator.forward, operator.arguments(impl, inputs, spec))
        with torch.no_grad():
            inputs = type(inputs)(*(x if x is None else x.detach() for x in inputs))
            found = operator.forward(*operator.arguments(impl, inputs, spec))
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
