"""Gated attention: the quadratic attention without softmax of the gated attention unit."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import reference
from ..kernels.operators.gated import call_gated
from ..kernels.spec import GatedInputs, GatedSpec
from ..kernels.transforms import readable, without_autocast
from .checks import (
    Sizes,
    check_activation,
    check_attention,
    check_bias,
    check_dropout,
    check_key_mask,
    check_state_tensors,
)
from .dispatch import make_plan, operation
from .sdpa_names import hint_at_names
from .state import KeyValueState


@operation
@hint_at_names
def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    activation: str = "relu2",
    is_causal: bool = False,
    length_scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: KeyValueState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, KeyValueState]:
    """Attention with weights ``f(q·k / n + b)`` without a normaliser, in O(T · S) time.

    ``out_i = Σ_j f(q_i·k_j / n_i + b_ij) v_j``, over j ≤ i if `is_causal`, else over all j. The
    function f is relu² or the Laplace function ``½ (1 + erf((x - √½) / (σ √2)))``, σ² = 1 / (4π).
    Memory is O(T + S).

    Args:
        query: ``[B, H, T, K]``; fp16, bf16, fp32 or fp64. Sums are taken in fp32 (fp64 for fp64).
        key: ``[B, G, S, K]``; the G key/value heads divide H, and query head h uses key/value head
            ``h // (H / G)``.
        value: ``[B, G, S, V]``.
        activation: f: "relu2" or "laplace".
        is_causal: query i sees keys up to i (and all of `state`); needs S = T.
        length_scale: n, one number for all queries or a tensor ``[B or 1, T or 1]``. The default is
            the number of keys that query i may see: i + 1 if `is_causal`, else all unmasked keys.
            So no causal output depends on how many tokens follow. The published unit divides by the
            length of the whole sequence, also when causal.
        bias: b, added to the scaled scores: ``[T, S]``, ``[H, T, S]`` or ``[B, 1 or H, T, S]``.
            Masked keys have columns too; with a state, S counts its keys as well.
        dropout_p: probability of dropping a weight; the others are divided by ``1 - dropout_p``.
        key_mask: ``[B, S]`` bool, True = attend. Masked keys and values may hold any numbers, NaN
            included; queries must be finite.
        cu_seqlens: ``[N + 1]`` int32/int64, offsets of N sequences packed end to end along T (then
            B = 1). The sequences do not see each other. Rows and columns of `bias` count from each
            sequence's start, and must be as many as the longest sequence has tokens. Cannot be used
            with a state.
        state: earlier keys and values, from `return_state`; it grows with every token.
        return_state: return ``(out, state)``, causal only.
        impl: "auto", "torch", "reference"; see `cumulant.explain`.

    Returns:
        ``[B, H, T, V]`` in query's dtype; a query with nothing to attend to gets zeros.

    Raises:
        ValueError, TypeError: a message with the argument, the expected and the received value.

    Sources: Hua et al. 2022, "Transformer Quality in Linear Time", section 2; Ma et al. 2022,
    "Mega", equation 16 (the Laplace function).
    """
    sizes = _check_arguments(
        query,
        key,
        value,
        activation,
        is_causal,
        length_scale,
        bias,
        dropout_p,
        key_mask,
        cu_seqlens,
        state,
        return_state,
    )
    if cu_seqlens is not None:
        slack = (torch.arange(sizes.S, device=key.device) >= cu_seqlens[-1])[:, None]
        query, key, value = (x.masked_fill(slack, 0) for x in (query, key, value))
    seen = _append_to_past(key, value, key_mask, state, own=return_state)
    key, value = seen.key, seen.value
    scale = _inverse_lengths(length_scale, query, key.shape[2], is_causal, seen.mask, cu_seqlens)
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    inputs = GatedInputs(query, key, value, scale, bias, cu_seqlens)
    plan = make_plan("gated", impl, inputs, GatedSpec(activation, is_causal, float(dropout_p)))
    if plan.impl == "reference":
        out = _run_reference(inputs, plan.spec)
    else:
        out = call_gated(plan.impl, inputs, plan.spec).out
    return (out, seen) if return_state else out


def _append_to_past(
    key: Tensor, value: Tensor, key_mask: Tensor | None, state: KeyValueState | None, *, own: bool
) -> KeyValueState:
    """All keys and values, the state's first, with zeros for masked ones.

    own: whether the result must not share memory with the arguments.
    """
    mask, count = key_mask, torch.full((key.shape[0],), key.shape[2], device=key.device)
    if key_mask is not None:
        hidden, count = ~key_mask[:, None, :, None], key_mask.sum(1)
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    if state is not None:
        if key_mask is not None or state.mask is not None:
            mask = torch.cat(
                (_mask_or_ones(state.mask, state.key), _mask_or_ones(key_mask, key)), 1
            )
        key = torch.cat((state.key.to(key.dtype), key), 2)
        value = torch.cat((state.value.to(value.dtype), value), 2)
        count = count + state.position
    elif own and key_mask is None:
        key, value = key.clone(), value.clone()
    elif own and key_mask is not None:
        mask = key_mask.clone()
    return KeyValueState(key, value, mask, count)


def _mask_or_ones(mask: Tensor | None, key: Tensor) -> Tensor:
    """The mask, or one of all True for ``key [B, G, S, K]``."""
    return key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if mask is None else mask


def _inverse_lengths(
    length_scale: float | Tensor | None,
    query: Tensor,
    keys: int,
    is_causal: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The factor 1 / n of every query: ``[B or 1, T or 1]``."""
    dtype, T = torch.promote_types(query.dtype, torch.float32), query.shape[2]
    if isinstance(length_scale, Tensor):
        return 1 / length_scale.to(dtype)
    if length_scale is not None:
        return torch.full((1, 1), 1 / length_scale, dtype=dtype, device=query.device)
    seen = (
        torch.ones(1, keys, dtype=torch.int64, device=query.device) if mask is None else mask.long()
    )
    running = seen.cumsum(1)
    if cu_seqlens is not None:
        bounds, index = cu_seqlens.long(), torch.arange(T, device=query.device)
        owner = (torch.searchsorted(bounds, index, right=True) - 1).clamp(max=bounds.shape[0] - 2)
        before = F.pad(running, (1, 0))
        count = (running if is_causal else before[:, bounds[owner + 1]]) - before[:, bounds[owner]]
    else:
        count = running[:, keys - T :] if is_causal else seen.sum(1, keepdim=True)
    return 1 / count.clamp(min=1).to(dtype)


def _run_reference(x: GatedInputs, spec: GatedSpec) -> Tensor:
    """The reference on the whole batch, or on each packed sequence separately."""
    run = partial(
        reference.gated_attention,
        activation=spec.activation,
        is_causal=spec.is_causal,
        dropout_p=spec.dropout_p,
    )
    with without_autocast(x.query):
        if x.cu_seqlens is None:
            return run(x.query, x.key, x.value, scale=x.scale, bias=x.bias)
        outs, bounds = [], x.cu_seqlens.tolist()
        for a, b in pairwise(bounds):
            bias = None if x.bias is None else x.bias[..., : b - a, : b - a]
            scale = x.scale if x.scale.shape[1] == 1 else x.scale[:, a:b]
            outs.append(
                run(*(t[:, :, a:b] for t in (x.query, x.key, x.value)), scale=scale, bias=bias)
            )
        outs.append(
            x.query.new_zeros(1, x.query.shape[1], x.query.shape[2] - bounds[-1], x.value.shape[3])
        )
        return torch.cat(outs, 2)


def _check_length_scale(length_scale: float | Tensor | None, sizes: Sizes) -> None:
    if isinstance(length_scale, Tensor) and length_scale.requires_grad:
        raise ValueError(
            "length_scale: no gradient reaches it; to learn a scale, multiply the query by it"
        )
    # Comparing shapes while compiling would fix the length of the graph.
    if isinstance(length_scale, Tensor) and not torch.compiler.is_compiling():
        fits = (
            length_scale.dim() == 2
            and length_scale.shape[0] in (1, sizes.B)
            and length_scale.shape[1] in (1, sizes.T)
        )
        if not fits:
            raise ValueError(
                f"length_scale: expected a number or [B or 1, T or 1] with B={sizes.B},"
                f" T={sizes.T}, got {list(length_scale.shape)}"
            )
    number = isinstance(length_scale, (int, float)) and not isinstance(length_scale, bool)
    if not isinstance(length_scale, Tensor | None) and not (number and 0 < length_scale < math.inf):
        raise ValueError(
            f"length_scale: expected a positive number or a tensor, got {length_scale!r}"
        )


def _check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    activation: str,
    is_causal: bool,
    length_scale: float | Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: KeyValueState | None,
    return_state: bool,
) -> Sizes:
    sizes = check_attention(
        query, key, value, is_causal=is_causal, key_mask=key_mask, cu_seqlens=cu_seqlens
    )
    check_activation(activation)
    check_dropout(dropout_p)
    _check_length_scale(length_scale, sizes)
    if state is not None or return_state:
        if not is_causal:
            raise ValueError(
                "state: only causal gated attention carries a state; pass is_causal=True"
            )
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens: a state of gated attention grows with each sequence; pass a padded"
                " batch"
            )
    past = 0 if not isinstance(state, KeyValueState) else state.key.shape[2]
    B, G = sizes.B, sizes.G
    expected = {"key": (B, G, past, sizes.K), "value": (B, G, past, sizes.V)}
    check_state_tensors(state, KeyValueState, expected, None, query)
    if state is not None:
        check_key_mask(state.mask, B, past, query.device, name="state.mask")
    T, S = sizes.T, past + sizes.S
    if bias is not None and cu_seqlens is not None and readable(cu_seqlens):
        T = S = max(
            int(cu_seqlens.diff().max()),
            min(bias.shape[-2:], default=0) if isinstance(bias, Tensor) else 0,
        )
    if bias is not None:
        shapes = (
            (T, S),
            (1, T, S),
            (sizes.H, T, S),
            *((b, h, T, S) for b in (1, B) for h in (1, sizes.H)),
        )
        check_bias(bias, shapes, "[T, S], [H, T, S] or [B, H, T, S]", query)
    return sizes
