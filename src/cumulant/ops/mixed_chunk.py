"""Mixed chunk attention: quadratic inside groups of tokens, linear across them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import reference
from ..kernels.operators.mixed_chunk import call_mixed_chunk
from ..kernels.spec import MixedChunkInputs, MixedChunkOutputs, MixedChunkSpec
from ..kernels.transforms import without_autocast
from .checks import (
    Sizes,
    check_activation,
    check_attention,
    check_bias,
    check_dropout,
    check_group_size,
    check_state_tensors,
)
from .cumulative import count_tokens
from .dispatch import Plan, make_plan, operation
from .sdpa_names import hint_at_names
from .state import MixedChunkState


@operation
@hint_at_names
def mixed_chunk_attention(
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    *,
    group_size: int = 256,
    is_causal: bool = False,
    activation: str = "relu2",
    bias: Tensor | None = None,
    reduce_group_non_causal_attn: bool = True,
    dropout_p: float = 0.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: MixedChunkState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, MixedChunkState]:
    """Gated attention inside groups of g tokens plus linear attention across groups.

    Let q, k be the quadratic and r, s the linear queries and keys, and ``c(i) = i // g`` the group
    of token i::

        out_i = Σ_{c(j) = c(i)} f(q_i·k_j / g + b[i % g, j % g]) v_j  +  r_iᵀ L_i
        is_causal: the first sum over j ≤ i,  L_i = 1/g Σ_{c(j) < c(i)} s_j v_jᵀ
        else:      L_i = 1/n Σ_j s_j v_jᵀ over all n tokens

    The function f is relu² or the Laplace function of `gated_attention`. There is no normaliser.
    Time is O(T · g), and memory O(T).

    A NaN or infinite value reaches all later outputs, and earlier outputs of its group, as
    ``0 · NaN`` does in softmax attention.

    Args:
        quad_query, lin_query: ``[B, H, T, K]``, each with its own K; fp16, bf16, fp32 or fp64. Sums
            are taken in fp32 (fp64 for fp64).
        quad_key, lin_key: ``[B, G, T, K]``; the G key/value heads divide H.
        value: ``[B, G, T, V]``.
        group_size: g, tokens in a group.
        is_causal: token i sees tokens up to i (and all of `state`).
        activation: f: "relu2" or "laplace".
        bias: b, ``[g, g]`` or ``[H, g, g]``, indexed by the positions of query and key in their
            group.
        reduce_group_non_causal_attn: True sums s_j v_jᵀ over all groups if not causal. False sums
            over the token's own group alone, still divided by n, so that no group sees another.
        dropout_p: probability of dropping a quadratic weight; the others are divided by
            ``1 - dropout_p``.
        key_mask: ``[B, T]`` bool, True = a token. Groups and n count unmasked tokens only, and the
            outputs of masked tokens are zero.
        cu_seqlens: ``[N + 1]`` int32/int64, offsets of N sequences packed end to end along T (then
            B = 1). The first group of each sequence begins at its first token. Rows after the last
            offset are zero. States have N rows.
        state: the past, from `return_state`. Its size does not depend on the number of tokens seen.
        return_state: return ``(out, state)``, causal only.
        impl: "auto", "native", "torch", "triton", "reference"; see `cumulant.explain`.

    Returns:
        ``[B, H, T, V]`` in value's dtype.

    Raises:
        ValueError, TypeError: a message with the argument, the expected and the received value.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", section 3.
    """
    tokens = (quad_query, quad_key, lin_query, lin_key, value)
    _check_arguments(
        tokens,
        group_size,
        is_causal,
        activation,
        bias,
        dropout_p,
        key_mask,
        cu_seqlens,
        state,
        return_state,
    )
    bias = None if bias is None else bias[(None,) * (3 - bias.dim())]
    inputs = MixedChunkInputs(*tokens, bias, key_mask, cu_seqlens, **_state_inputs(state))
    reduced = reduce_group_non_causal_attn or is_causal
    spec = MixedChunkSpec(
        group_size, activation, is_causal, reduced, float(dropout_p), return_state
    )
    plan = make_plan("mixed_chunk", impl, inputs, spec)
    if plan.impl == "reference":
        with without_autocast(value):
            found = _run_reference(inputs, spec)
    else:
        found = _run_kernel(plan, inputs)
    if not return_state:
        return found.out
    return found.out, MixedChunkState(
        *found.state, count_tokens(value, key_mask, cu_seqlens, state)
    )


def _state_inputs(state: MixedChunkState | None) -> dict[str, Tensor]:
    """The tensors of a state under the names of the kernels' inputs."""
    if state is None:
        return {}
    return {
        "numerator": state.numerator,
        "open_quad_key": state.quad_key,
        "open_lin_key": state.lin_key,
        "open_value": state.value,
        "position": state.position,
    }


def _run_kernel(plan: Plan[MixedChunkSpec], inputs: MixedChunkInputs) -> MixedChunkOutputs:
    if inputs.value.shape[3] > 0:
        return call_mixed_chunk(plan.impl, inputs, plan.spec)
    # Kernels need at least one channel, so one of zeros is added here and removed below.
    wide = {name: getattr(inputs, name) for name in ("value", "numerator", "open_value")}
    wide = {name: None if x is None else pad(x, (0, 1)) for name, x in wide.items()}
    out, numerator, quad_key, lin_key, value = call_mixed_chunk(
        plan.impl, inputs._replace(**wide), plan.spec
    )
    return MixedChunkOutputs(out[..., :0], numerator[..., :0], quad_key, lin_key, value[..., :0])


def _run_reference(x: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkOutputs:
    """The reference on the whole batch, or on each packed sequence separately."""
    run = partial(
        reference.mixed_chunk_attention,
        activation=spec.activation,
        group_size=spec.group_size,
        is_causal=spec.is_causal,
        reduce_groups=spec.reduce_groups,
        bias=x.bias,
        dropout_p=spec.dropout_p,
    )
    past: Any = None if x.numerator is None else x.sums
    if x.cu_seqlens is None:
        out, sums = run(*x.tokens, key_mask=x.key_mask, state=past, position=x.position)
        return MixedChunkOutputs(out, *sums)
    outs, ends, bounds = [], [], x.cu_seqlens.tolist()
    for i, (a, b) in enumerate(pairwise(bounds)):
        row = None if past is None else tuple(s[i : i + 1] for s in past)
        position = None if x.position is None else x.position[i : i + 1]
        mask = None if x.key_mask is None else x.key_mask[:, a:b]
        out, sums = run(
            *(t[:, :, a:b] for t in x.tokens), key_mask=mask, state=row, position=position
        )
        outs.append(out)
        ends.append(sums)
    slack = x.value.shape[2] - bounds[-1]
    outs.append(x.value.new_zeros(1, x.quad_query.shape[1], slack, x.value.shape[3]))
    return MixedChunkOutputs(
        torch.cat(outs, 2), *(torch.cat(parts) for parts in zip(*ends, strict=True))
    )


def _check_arguments(
    inputs: tuple[Tensor, ...],
    group_size: int,
    is_causal: bool,
    activation: str,
    bias: Tensor | None,
    dropout_p: float,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: MixedChunkState | None,
    return_state: bool,
) -> Sizes:
    quad_query, quad_key, lin_query, lin_key, value = inputs
    masks: dict[str, Any] = {"is_causal": False, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
    sizes = check_attention(quad_query, quad_key, value, names=("quad_query", "quad_key"), **masks)
    linear = check_attention(lin_query, lin_key, value, names=("lin_query", "lin_key"), **masks)
    if sizes.T != sizes.S:
        raise ValueError(
            "quad_key: mixed chunk attention is over the queries' own tokens (S = T), got"
            f" T={sizes.T}, S={sizes.S}"
        )
    if lin_query.shape[:3] != quad_query.shape[:3] or lin_query.dtype != quad_query.dtype:
        raise ValueError(
            f"lin_query: expected [B, H, T, K] = [{sizes.B}, {sizes.H}, {sizes.T}, K] as"
            f" quad_query, in {quad_query.dtype}, got {list(lin_query.shape)} in {lin_query.dtype}"
        )
    check_group_size(group_size)
    check_activation(activation)
    check_dropout(dropout_p)
    g = group_size
    check_bias(
        bias, ((g, g), (1, g, g), (sizes.H, g, g)), "[g, g] or [H, g, g]", value, static=True
    )
    if (state is not None or return_state) and not is_causal:
        raise ValueError(
            "state: only causal mixed chunk attention carries a state; pass is_causal=True"
        )
    rows = sizes.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "numerator": (rows, sizes.G, linear.K, sizes.V),
        "quad_key": (rows, sizes.G, g, sizes.K),
        "lin_key": (rows, sizes.G, g, linear.K),
        "value": (rows, sizes.G, g, sizes.V),
    }
    check_state_tensors(
        state, MixedChunkState, expected, torch.promote_types(value.dtype, torch.float32), value
    )
    return sizes
