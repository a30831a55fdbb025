"""Mixed chunk attention: quadratic inside groups of tokens, linear across them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.transforms import needs_formula, without_autocast
from .checks import Sizes, check_activation, check_attention, check_bias, check_dropout, check_group_size, check_parts
from .cumulative import count_tokens
from .dispatch import Choice, native_obstacle, reasons, resolve
from .sdpa_names import hint_at_names
from .state import MixedChunkState

SPAN = 512  # the fewest tokens that a thread of the native kernels takes when one sequence is shared out


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
    """Gated attention inside groups of g tokens plus linear attention across groups: O(T · g) time, O(T) memory.

    With q, k the quadratic, r, s the linear queries and keys, and ``c(i) = i // g`` the group of token i::

        out_i = Σ_{c(j) = c(i)} f(q_i·k_j / g + b[i % g, j % g]) v_j  +  r_iᵀ L_i
        is_causal: the first sum over j ≤ i,  L_i = 1/g Σ_{c(j) < c(i)} s_j v_jᵀ
        else:      L_i = 1/n Σ_j s_j v_jᵀ over all n tokens

    f is relu² or the Laplace function of `gated_attention`. Nothing is normalised. A value that is NaN or infinite
    reaches every output of later tokens, and earlier ones of its group, as ``0 · NaN`` does in softmax attention.

    Args:
        quad_query, lin_query: ``[B, H, T, K]``; the two may differ in K; fp16, bf16, fp32 or fp64. Sums are taken in
            fp32 (fp64 for fp64).
        quad_key, lin_key: ``[B, G, T, K]``; the G key/value heads divide H.
        value: ``[B, G, T, V]``.
        group_size: g, tokens in a group.
        is_causal: token i sees tokens up to i (and all of `state`).
        activation: f: "relu2" or "laplace".
        bias: b, ``[g, g]`` or ``[H, g, g]``, by the places of query and key in their group.
        reduce_group_non_causal_attn: False, when not causal: sum s_j v_jᵀ over the token's own group alone (still over
            n), so that no group sees another.
        dropout_p: probability of dropping a quadratic weight; the others are divided by ``1 - dropout_p``.
        key_mask: ``[B, T]`` bool, True = a token. What is masked does not exist: groups count the tokens that do, n
            counts them, and outputs are zero at the others.
        cu_seqlens: ``[N + 1]`` int32/int64, offsets of N sequences packed end to end along T (then B = 1); groups begin
            with each sequence. Rows after the last offset come out as zeros. States have N rows.
        state: the past, from `return_state`; its size does not depend on how many tokens it has seen.
        return_state: return ``(out, state)``, causal only.
        impl: "auto", "native", "torch", "reference"; see `cumulant.explain`.

    Returns:
        ``[B, H, T, V]`` in value's dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", section 3.
    """
    inputs = (quad_query, quad_key, lin_query, lin_key, value)
    _check(inputs, group_size, is_causal, activation, bias, dropout_p, key_mask, cu_seqlens, state, return_state)
    reduced = reduce_group_non_causal_attn or is_causal
    bias = None if bias is None else bias[(None,) * (3 - bias.dim())]
    chosen = resolve(impl, _obstacle(value, dropout_p))
    if chosen == "reference":
        run = partial(
            reference.mixed_chunk_attention,
            activation=activation,
            group_size=group_size,
            is_causal=is_causal,
            reduce_groups=reduced,
            bias=bias,
            dropout_p=dropout_p,
        )
        with without_autocast(value):
            out, parts = _reference(run, inputs, key_mask, cu_seqlens, state)
    else:
        options = (return_state, group_size, activation, is_causal, reduced)
        out, *parts = _run(chosen, inputs, bias, key_mask, cu_seqlens, state, options, dropout_p)
    if not return_state:
        return out
    numerator, open_quad_key, open_lin_key, open_value = parts
    position = count_tokens(value, key_mask, cu_seqlens, state)
    return out, MixedChunkState(numerator, open_quad_key, open_lin_key, open_value, position)


def _run(
    chosen: str,
    inputs: tuple[Tensor, ...],
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: MixedChunkState | None,
    options: tuple[bool, int, str, bool, bool],
    dropout_p: float,
) -> Any:
    if inputs[4].shape[3] == 0:  # the kernels need a channel: one of zeros, taken away again
        pad = partial(torch.nn.functional.pad, pad=(0, 1))
        if state is not None:
            state = replace(state, numerator=pad(state.numerator), value=pad(state.value))
        results = _run(chosen, (*inputs[:4], pad(inputs[4])), bias, key_mask, cu_seqlens, state, options, dropout_p)
        out, numerator, quad_key, lin_key, value = results
        return out[..., :0], numerator[..., :0], quad_key, lin_key, value[..., :0]
    past = (None,) * 5 if state is None else _parts(state)
    if needs_formula(torch.compiler.is_compiling()):
        from ..kernels.differentiable.mixed_chunk import attention

        return attention(inputs, bias, key_mask, cu_seqlens, past, *options[1:], dropout_p)
    if chosen == "native":
        from ..kernels.native.mixed_chunk import attention as native

        return native(*inputs, bias, key_mask, cu_seqlens, *past, *options, SPAN)
    from ..kernels.chunked.mixed_chunk import attention as chunked

    seed = torch.randint(2**62, (1,)) if dropout_p else None
    return chunked(*inputs, bias, key_mask, cu_seqlens, *past, seed, *options, float(dropout_p))


def _obstacle(value: Tensor, dropout_p: float) -> str:
    return native_obstacle(value) or ("its kernels have no dropout" if dropout_p else "")


def _parts(state: MixedChunkState) -> tuple[Tensor, ...]:
    return state.numerator, state.quad_key, state.lin_key, state.value, state.position


def _reference(
    run: Any,
    inputs: tuple[Tensor, ...],
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: MixedChunkState | None,
) -> tuple[Tensor, list[Tensor]]:
    """The whole batch, or each packed sequence by itself."""
    if cu_seqlens is None:
        past = (None, None) if state is None else (_parts(state)[:4], state.position)
        out, parts = run(*inputs, key_mask=key_mask, state=past[0], position=past[1])
        return out, list(parts)
    outs, ends, bounds = [], [], cu_seqlens.tolist()
    for i, (a, b) in enumerate(pairwise(bounds)):
        row = None if state is None else state.map(lambda x, i=i: x[i : i + 1])  # type: ignore[misc]
        mask = None if key_mask is None else key_mask[:, a:b]
        out, parts = _reference(run, tuple(x[:, :, a:b] for x in inputs), mask, None, row)
        outs.append(out)
        ends.append(parts)
    value = inputs[4]
    outs.append(value.new_zeros(1, inputs[0].shape[1], value.shape[2] - bounds[-1], value.shape[3]))
    return torch.cat(outs, 2), [torch.cat(x) for x in zip(*ends, strict=True)]


def _check(
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
            f"quad_key: mixed chunk attention is over the queries' own tokens (S = T), got T={sizes.T}, S={sizes.S}"
        )
    if lin_query.shape[:3] != quad_query.shape[:3] or lin_query.dtype != quad_query.dtype:
        raise ValueError(
            f"lin_query: expected [B, H, T, K] = [{sizes.B}, {sizes.H}, {sizes.T}, K] as quad_query, in "
            f"{quad_query.dtype}, got {list(lin_query.shape)} in {lin_query.dtype}"
        )
    check_group_size(group_size)
    check_activation(activation)
    check_dropout(dropout_p)
    g = group_size
    check_bias(bias, ((g, g), (1, g, g), (sizes.H, g, g)), "[g, g] or [H, g, g]", value, static=True)
    if (state is not None or return_state) and not is_causal:
        raise ValueError("state: only causal mixed chunk attention carries a state; pass is_causal=True")
    rows = sizes.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = {
        "numerator": (rows, sizes.G, linear.K, sizes.V),
        "quad_key": (rows, sizes.G, g, sizes.K),
        "lin_key": (rows, sizes.G, g, linear.K),
        "value": (rows, sizes.G, g, sizes.V),
    }
    check_parts(state, MixedChunkState, expected, torch.promote_types(value.dtype, torch.float32), value)
    return sizes


def _explain(
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    *,
    group_size: int,
    is_causal: bool,
    activation: str,
    bias: Tensor | None,
    reduce_group_non_causal_attn: bool,
    dropout_p: float,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: MixedChunkState | None,
    return_state: bool,
    impl: str,
) -> Choice:
    inputs = (quad_query, quad_key, lin_query, lin_key, value)
    sizes = _check(
        inputs, group_size, is_causal, activation, bias, dropout_p, key_mask, cu_seqlens, state, return_state
    )
    obstacle = _obstacle(value, dropout_p)
    if sizes.T == 1 and state is not None and return_state:
        return reasons(impl, f"one token onto a state, {group_size} slots of the open group", obstacle)
    return reasons(impl, f"groups of {group_size} tokens, one after another", obstacle)


mixed_chunk_attention.plan = _explain  # type: ignore[attr-defined]
