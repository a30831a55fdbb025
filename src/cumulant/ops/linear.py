"""Linear attention: the exponential of softmax becomes an inner product of feature maps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.spec import AttentionInputs, AttentionSpec, sequence_count
from .checks import check_attention, check_linear_state
from .cumulative import initial_sums, run_plan
from .dispatch import Plan, make_plan, operation
from .feature_maps import ELEMENTWISE, FeatureMap, apply_maps, check_feature_map, softmax_features
from .repeated import recall, remember, signature
from .sdpa_names import hint_at_names
from .state import LinearState


@operation
@hint_at_names
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap = "elu",
    *,
    is_causal: bool = False,
    scale: float | None = None,
    normalize: bool = True,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention with weights ``φ(q)·φ(k)``, in O(T) time and memory.

    ``out_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j))``, over j ≤ i if `is_causal`, else over
    all j; ``normalize=False`` leaves out the denominator.

    A NaN or infinite value reaches all later outputs. It also reaches earlier outputs of its chunk,
    which has at most 128 tokens.

    Args:
        query: ``[B, H, T, K]``; fp16, bf16, fp32 or fp64. Sums are taken in fp32 (fp64 for fp64).
        key: ``[B, G, S, K]``; the G key/value heads divide H, and query head h uses key/value head
            ``h // (H / G)``.
        value: ``[B, G, S, V]``.
        feature_map: ``"elu"`` (elu + 1), ``"relu"``, ``"softmax"`` (Shen et al.), ``"identity"``;
            or a callable or module ``[..., K] -> [..., F]``, applied in the inputs' dtype; or a
            pair of callables, for queries and for keys.
        is_causal: query i sees keys up to i (and all of `state`); needs S = T.
        scale: factor of the query before its feature map, by default 1.
        normalize: divide by the sum of weights.
        log_decay: ``[B, G, S]`` fp32 or fp64, at most 0; causal only. Weights are multiplied by
            ``exp(Σ log_decay_l)`` over the tokens l after the key and up to the query: 0 keeps
            everything, -inf forgets all tokens before. A masked token decays nothing. Positive ones
            are refused; compiled code and `vmap` cannot see them, and take them as 0.
        key_mask: ``[B, S]`` bool, True = attend. Masked keys and values may hold any numbers, NaN
            included; queries must be finite.
        cu_seqlens: ``[N + 1]`` int32/int64, offsets of N sequences packed end to end along T (then
            B = 1). The sequences do not see each other. Rows after the last offset are zero. States
            have N rows.
        state: sums over earlier keys, from `return_state`.
        return_state: return ``(out, state)``. If not causal, the state holds the sums over all keys
            of the context, for later queries.
        impl: "auto", "native", "torch", "triton", "reference"; see `cumulant.explain`.

    Returns:
        ``[B, H, T, V]`` in query's dtype. A query with nothing to attend to, or with all features
        zero, gets zeros.

    Raises:
        ValueError, TypeError: a message with the argument, the expected and the received value.

    Sources: Katharopoulos et al. 2020, "Transformers are RNNs", equations 4 to 12; Shen et al.
    2018, "Efficient Attention".
    """
    options = "linear", feature_map, is_causal, scale, normalize, return_state, impl
    alike = signature(options, (key_mask, cu_seqlens), query, key, value, log_decay, state)
    if repeated := recall(alike):
        return repeated(query, key, value, log_decay, state)
    sizes = check_attention(
        query,
        key,
        value,
        is_causal=is_causal,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        log_decay=log_decay,
    )
    check_feature_map(feature_map, None if log_decay is None else "log_decay")
    named = feature_map if isinstance(feature_map, str) else ""
    elementwise = named in ELEMENTWISE
    scale = 1.0 if scale is None else float(scale)
    q, k = query, key
    if not elementwise:
        q, k = _zero_masked_tokens(q if scale == 1.0 else q * scale, k, key_mask, cu_seqlens)
    if not isinstance(feature_map, str):
        q, k = apply_maps(feature_map, q, k)
    rows = sequence_count(sizes.B, cu_seqlens)
    check_linear_state(state, rows, sizes, k.shape[-1], normalize, query)
    divides = normalize and named != "softmax"  # softmax features need no further normaliser
    sums = initial_sums(state, divides)
    inputs = AttentionInputs(q, k, value, key_mask, cu_seqlens, *sums, log_decay)
    spec = AttentionSpec(
        order=0,
        constant_term=True,
        activation=named if elementwise else "identity",
        scale=scale if elementwise else 1.0,
        normalize=divides,
        is_causal=is_causal,
        returns_state=return_state,
    )
    plan = make_plan("attention", impl, inputs, spec)
    if elementwise and (repeated := remember(alike, plan, inputs, return_state)):
        return repeated(query, key, value, log_decay, state)
    if named == "softmax":
        out, end = _run_softmax_features(plan, inputs, spec, state, normalize)
    else:
        out, end = run_plan(plan, inputs, state)
    return (out.to(query.dtype), end) if return_state else out.to(query.dtype)


def _run_softmax_features(
    plan: Plan[AttentionSpec],
    inputs: AttentionInputs,
    spec: AttentionSpec,
    state: LinearState | None,
    normalize: bool,
) -> tuple[Tensor, LinearState]:
    """`run_plan` with the features of `feature_map` "softmax", which a plan knows nothing of."""
    if not normalize:
        wide = torch.promote_types(inputs.query.dtype, torch.float32)
        q, k = inputs.query.to(wide).softmax(-1), inputs.key.to(wide).exp()
        return run_plan(plan, inputs._replace(query=q, key=k), state)
    past = None if state is None else state.denominator
    q, k, denominator = softmax_features(inputs, spec, denominator=past)
    out, end = run_plan(plan, inputs._replace(query=q, key=k), state)
    return out, replace(end, denominator=denominator)


def _zero_masked_tokens(
    query: Tensor, key: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Set masked keys, and all tokens after the last packed sequence, to zero.

    Their numbers may be NaN, and must not reach a feature map.
    """
    if cu_seqlens is not None:
        slack = (torch.arange(key.shape[2], device=key.device) >= cu_seqlens[-1])[:, None]
        query, key = query.masked_fill(slack, 0), key.masked_fill(slack, 0)
    return query, key if key_mask is None else key.masked_fill(~key_mask[:, None, :, None], 0)
