"""Kernelised linear attention: softmax's exponential replaced by a product of feature maps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .checks import Sizes, check_attention, check_linear_state
from .cumulative import Kernel, attend, choose, plan
from .dispatch import Choice
from .feature_maps import ELEMENTWISE, FeatureMap, apply_maps, check_feature_map, softmax_features
from .sdpa_names import hint_at_names
from .state import LinearState


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
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention with weights ``φ(q)·φ(k)``, in O(T) time and memory.

    ``out_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j))``, over j ≤ i if `is_causal`, else over all j;
    ``normalize=False`` leaves out the denominator. A NaN or infinite value reaches later outputs, and earlier ones of
    its chunk (at most 128 tokens).

    Args:
        query: ``[B, H, T, K]``; fp16, bf16, fp32 or fp64. Sums are taken in fp32 (fp64 for fp64).
        key: ``[B, G, S, K]``; the G key/value heads divide H, query head h uses key head ``h // (H / G)``.
        value: ``[B, G, S, V]``.
        feature_map: ``"elu"`` (elu + 1), ``"relu"``, ``"softmax"`` (Shen et al.), ``"identity"``, or any callable or
            module ``[..., K] -> [..., F]``, applied in the inputs' dtype; or a pair, for queries and for keys.
        is_causal: query i sees keys up to i (and all of `state`); needs S = T.
        scale: factor of the query before its feature map, by default 1.
        normalize: divide by the sum of weights.
        key_mask: ``[B, S]`` bool, True = attend. Masked keys count for nothing, whatever they hold; queries must
            be finite.
        cu_seqlens: ``[N + 1]`` int32/int64, offsets of N sequences packed end to end along T (then B = 1); they do not
            see each other. Rows after the last offset come out as zeros. States have N rows.
        state: sums over earlier keys, from `return_state`.
        return_state: return ``(out, state)``; not causal, the state is the whole context's, for later queries.
        impl: "auto", "native", "torch", "reference"; see `cumulant.explain`.

    Returns:
        ``[B, H, T, V]`` in query's dtype; a query with nothing to attend to, or with all features zero, gets zeros.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Sources: Katharopoulos et al. 2020, "Transformers are RNNs", equations 4 to 12; Shen et al. 2018, "Efficient
    Attention".
    """
    sizes = check_attention(query, key, value, is_causal=is_causal, key_mask=key_mask, cu_seqlens=cu_seqlens)
    check_feature_map(feature_map)
    q, k, denominator, dtype = query, key, None, query.dtype
    kernel = Kernel(0, True, "identity", 1.0 if scale is None else float(scale), normalize, is_causal)
    if isinstance(feature_map, str) and feature_map in ELEMENTWISE:
        kernel = replace(kernel, activation=feature_map)
        _check_state(sizes, sizes.K, normalize, query, cu_seqlens, state)
    else:
        q, k = _clear(q if scale is None else q * scale, k, key_mask, cu_seqlens)
        kernel = replace(kernel, scale=1.0)
        if not isinstance(feature_map, str):
            q, k = apply_maps(feature_map, q, k)
        _check_state(sizes, k.shape[-1], normalize, query, cu_seqlens, state)
        if feature_map == "softmax" and normalize:
            kernel = replace(kernel, normalize=False)
            past = None if state is None else state.denominator
            q, k, denominator = softmax_features(
                q,
                k,
                is_causal=is_causal,
                key_mask=key_mask,
                cu_seqlens=cu_seqlens,
                denominator=past,
                return_state=return_state,
            )
        elif feature_map == "softmax":
            wide = torch.promote_types(dtype, torch.float32)
            q, k = q.to(wide).softmax(-1), k.to(wide).exp()
    out, total = attend(
        choose(impl, query, 0, S=sizes.S, is_causal=is_causal, stateful=state is not None or return_state)[0],
        kernel,
        q,
        k,
        value,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        state=state,
        return_state=return_state,
    )
    if denominator is not None:
        total = replace(total, denominator=denominator)
    out = out.to(dtype)
    return (out, total) if return_state else out


def _clear(query: Tensor, key: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros for masked keys and beyond the last packed sequence: what stands there must not reach a feature map."""
    if cu_seqlens is not None:
        slack = (torch.arange(key.shape[2], device=key.device) >= cu_seqlens[-1])[:, None]
        query, key = query.masked_fill(slack, 0), key.masked_fill(slack, 0)
    return query, key if key_mask is None else key.masked_fill(~key_mask[:, None, :, None], 0)


def _check_state(
    sizes: Sizes, features: int, normalize: bool, query: Tensor, cu_seqlens: Tensor | None, state: LinearState | None
) -> None:
    rows = sizes.B if cu_seqlens is None else len(cu_seqlens) - 1
    check_linear_state(state, rows, sizes, features, normalize, query)


def _explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    is_causal: bool,
    scale: float | None,
    normalize: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: LinearState | None,
    return_state: bool,
    impl: str,
) -> Choice:
    sizes = check_attention(query, key, value, is_causal=is_causal, key_mask=key_mask, cu_seqlens=cu_seqlens)
    check_feature_map(feature_map)
    features = sizes.K if isinstance(feature_map, str) else apply_maps(feature_map, query, key)[1].shape[-1]
    _check_state(sizes, features, normalize, query, cu_seqlens, state)
    return plan(
        impl,
        query,
        0,
        S=sizes.S,
        is_causal=is_causal,
        stateful=state is not None or return_state or cu_seqlens is not None,
        features=features,
    )


linear_attention.plan = _explain  # type: ignore[attr-defined]
