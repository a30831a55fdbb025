"""Makes chunks and blocks short, so that short sequences are walked in several pieces."""

from __future__ import annotations

from typing import Any

from cumulant.ops.repeated import forget

PLACES = {
    "chunk": ("torch.attention.CHUNK", "native.attention.CHUNK", "differentiable.attention.CHUNK"),
    "triton_chunk": (
        "triton.attention.CHUNK",
        "triton.elita.CHUNK",
        "triton.mixed_chunk.CHUNK",
    ),  # a power of two, at least 16
    "span": ("native.attention.SPAN", "triton.attention.SPAN"),
    "triton_processors": ("triton.device.PROCESSORS",),
    "elita_chunk": ("torch.elita.CHUNK",),
    "elita_span": ("native.elita.SPAN", "triton.elita.SPAN"),
    "elita_block": ("differentiable.elita.BLOCK",),
    "block": ("torch.gated.BLOCK", "differentiable.gated.BLOCK"),
}


def walk(monkeypatch: Any, **sizes: int) -> None:
    """chunk, span: linear and Taylor attention; block: gated attention; the others: ELiTA."""
    for kind, size in sizes.items():
        for place in PLACES[kind]:
            monkeypatch.setattr(f"cumulant.kernels.{place}", size)
    forget()
