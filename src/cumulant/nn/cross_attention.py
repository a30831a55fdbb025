"""The arguments of cross attention: which calls are cross attention, and what they must pass."""

from __future__ import annotations

from torch import Tensor

from ..ops.checks import check_key_mask

_NO_ROTARY = (
    "rotary: queries and context have no common positions; build with rotary=False for cross"
    " attention"
)


def check_context_dim(context_dim: int | None, *, is_causal: bool, rotary: bool) -> None:
    """A module that is built for a context is neither causal nor rotary."""
    if context_dim is not None and is_causal:
        raise ValueError(
            "context_dim: causal attention takes no context; build with is_causal=False"
        )
    if context_dim is not None and rotary:
        raise ValueError(_NO_ROTARY)


def is_cross_attention(
    x: Tensor,
    context: Tensor | None,
    context_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    has_state: bool,
    return_state: bool,
    context_dim: int,
    is_causal: bool,
    rotary: bool,
) -> bool:
    """Whether a call is cross attention. Arguments that contradict each other raise an error."""
    if is_causal:
        if context is not None or context_mask is not None:
            raise ValueError(
                "context: causal attention is over x itself; build with is_causal=False for"
                " cross attention"
            )
        return False
    if context is None:
        if context_mask is not None:
            raise ValueError("context_mask: given without a context; the mask of x is key_mask")
        if not has_state:
            _check_self_attention(x, context_dim, return_state)
            return False
    if rotary:
        raise ValueError(_NO_ROTARY)
    if cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens: packed sequences have no context; pass a padded batch with key_mask"
        )
    if context is not None:
        _check_context(x, context, context_mask, context_dim)
    return True


def _check_self_attention(x: Tensor, context_dim: int, return_state: bool) -> None:
    """Without a context, x itself must fit the projections, and there is no state to return."""
    if return_state:
        raise ValueError(
            "return_state: only causal attention carries a state from call to call"
            " (is_causal=True); for cross attention pass the context"
        )
    if context_dim != x.shape[2]:
        raise ValueError(
            f"context: needed, as keys and values are projected from {context_dim} channels"
        )


def _check_context(
    x: Tensor, context: Tensor, context_mask: Tensor | None, context_dim: int
) -> None:
    """The context is ``[B, S, context_dim]`` with the batch, dtype and device of x."""
    if not isinstance(context, Tensor) or context.dtype != x.dtype or context.device != x.device:
        got = (
            f"{context.dtype} on {context.device}"
            if isinstance(context, Tensor)
            else type(context).__name__
        )
        raise TypeError(f"context: expected a tensor like x, {x.dtype} on {x.device}, got {got}")
    if context.dim() != 3 or context.shape[0] != x.shape[0] or context.shape[2] != context_dim:
        raise ValueError(
            f"context: expected [B, S, D] = [{x.shape[0]}, S, {context_dim}], got"
            f" {list(context.shape)}"
        )
    check_key_mask(context_mask, x.shape[0], context.shape[1], x.device, name="context_mask")
