"""Every operator against its schema, its fake kernel, its registration and AOT dispatch, however its inputs lie in
memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cumulant.kernels.bilinear import bilinear, bilinear_backward
from cumulant.kernels.chunked import chunked_attention, chunked_attention_backward
from cumulant.kernels.chunked.elita import elita_attention, elita_attention_backward
from cumulant.kernels.chunked.gated import gated_attention, gated_attention_backward
from cumulant.kernels.chunked.mixed_chunk import mixed_chunk_attention, mixed_chunk_attention_backward
from cumulant.kernels.native import attention as native
from cumulant.kernels.native import elita as native_elita
from cumulant.kernels.native import mixed_chunk as native_mixed

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
        x = torch.randn(*shape[:1], *(1 if n > 1 else n for n in shape[1:-1]), shape[-1], dtype=dtype).expand(shape)
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


def attention(layout: str, is_causal: bool, native_one: bool) -> tuple[Any, ...]:
    (B, H, G, T), K, V = sizes(layout), 5, 3
    q, k, v = (tensor((B, n, T, d), layout) for n, d in ((H, K), (G, K), (G, V)))
    wide = "plain" if layout == "half" else layout
    S = tensor((B, G, K, V), wide, sums_dtype(layout))
    Z = tensor((B, G, K), wide, sums_dtype(layout)).detach().abs().add(1).requires_grad_()
    mask = torch.rand(T, B).gt(0.3).T
    chunks = (CHUNK, CHUNK) if native_one else (CHUNK,)
    return q, k, v, mask, None, S, Z, is_causal, 0, True, "elu", 0.5, True, is_causal, *chunks


def mixed(layout: str, is_causal: bool, native_one: bool) -> tuple[Any, ...]:
    (B, H, G, T), K, L, V, g = sizes(layout), 5, 4, 3, 8
    five = [tensor((B, n, T, d), layout) for n, d in ((H, K), (G, K), (H, L), (G, L), (G, V))]
    bias = tensor((H, g, g), "plain" if layout == "half" else layout)
    past: tuple[Any, ...] = (None,) * 5
    if is_causal:
        shapes = ((B, G, L, V), (B, G, g, K), (B, G, g, L), (B, G, g, V))
        position = torch.arange(3, 3 + B)
        past = (*(tensor(x, "plain" if layout == "half" else layout, sums_dtype(layout)) for x in shapes), position)
    options = (is_causal, g, "laplace", is_causal, True)
    return (*five, bias, None, None, *past, *options, 8) if native_one else (
        *five, bias, None, None, *past, None, *options, 0.0
    )  # fmt: skip


def logits(layout: str, *_: bool) -> tuple[Any, ...]:
    (B, H, G, T), V = sizes(layout), 3
    wide = "plain" if layout == "half" else layout
    three = [tensor((B, n, T), wide, sums_dtype(layout)) for n in (G, H, H)]
    past = tensor((B, G), "plain"), tensor((B, G, V), wide)
    return *three, tensor((B, G, T, V), layout), None, *past, 4


def gated(layout: str, is_causal: bool, _: bool) -> tuple[Any, ...]:
    B, H, G, T = sizes(layout)
    q, k, v = (tensor((B, n, T, d), layout) for n, d in ((H, 5), (G, 5), (G, 3)))
    bias, scale = tensor((B, H, T, T), layout), torch.rand(B, T, dtype=sums_dtype(layout))
    return q, k, v, scale, bias, None, None, "laplace", is_causal, 0.0, 8


def outer(layout: str, *_: bool) -> tuple[Any, ...]:
    rows = 0 if layout in ("empty batch", "no tokens") else 6
    return tensor((rows, 3), layout), tensor((rows, 2), layout), tensor((4, 6), layout)


def attention_backward(inputs: tuple[Any, ...], out: tuple[Tensor, ...], native_one: bool) -> tuple[Any, ...]:
    upstream = (torch.randn_like(out[0]), None, None)
    return *upstream, *inputs[:7], *out, *inputs[8 if native_one else 7 :]


def mixed_backward(inputs: tuple[Any, ...], out: tuple[Tensor, ...], native_one: bool) -> tuple[Any, ...]:
    upstream = (torch.randn_like(x) if x.numel() else None for x in out[1:])
    at = 13 if native_one else 14
    return torch.randn_like(out[0]), *upstream, *inputs[:at], *inputs[at + 1 :]


def logits_backward(inputs: tuple[Any, ...], out: tuple[Tensor, ...], _: bool) -> tuple[Any, ...]:
    upstream = (torch.randn_like(x) for x in (out[0], *out[-2:]))
    return *upstream, *inputs[:7], *out[1:-2], inputs[7]


def simple_backward(inputs: tuple[Any, ...], out: Any, _: bool) -> tuple[Any, ...]:
    return torch.randn_like(out), *inputs


ROWS: dict[str, tuple[Any, Any, Callable[..., Any], Callable[..., Any]]] = {
    "torch": (chunked_attention, chunked_attention_backward, attention, attention_backward),
    "native": (native.native_attention, native.native_attention_backward, attention, attention_backward),
    "mixed torch": (mixed_chunk_attention, mixed_chunk_attention_backward, mixed, mixed_backward),
    "mixed native": (
        native_mixed.mixed_chunk_attention, native_mixed.mixed_chunk_attention_backward, mixed, mixed_backward,
    ),
    "elita torch": (elita_attention, elita_attention_backward, logits, logits_backward),
    "elita native": (native_elita.elita_attention, native_elita.elita_attention_backward, logits, logits_backward),
    "gated": (gated_attention, gated_attention_backward, gated, simple_backward),
    "bilinear": (bilinear, bilinear_backward, outer, simple_backward),
}  # fmt: skip


def all_rows() -> list[Any]:
    return [
        pytest.param(name, layout, marks=() if layout in QUICK else pytest.mark.slow)
        for name in ROWS
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("name", "layout"), all_rows())
@pytest.mark.filterwarnings("ignore")
def test_operators_are_what_they_promise(name: str, layout: str):
    forward, backward, arguments, backward_arguments = ROWS[name]
    for is_causal in (True, False):
        inputs = arguments(layout, is_causal, "native" in name)
        torch.library.opcheck(forward, inputs)
        with torch.no_grad():
            detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
            out = forward(*detached)
            torch.library.opcheck(backward, backward_arguments(detached, out, "native" in name))
