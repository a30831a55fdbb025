"""Feature maps of kernelised linear attention: a name, a callable, or a pair of callables.

A pair has one map for queries and one for keys. A map takes ``[..., K]`` to ``[..., F]``. Names:

- ``"elu"``: ``elu(x) + 1`` (Katharopoulos et al. 2020), positive.
- ``"relu"``: ``max(x, 0)``; a query whose features are all zero gets zeros.
- ``"identity"``: ``x`` (pair it with ``normalize=False``: its denominators change sign).
- ``"softmax"``: ``softmax(q)`` over features and ``softmax(k)`` over tokens (Shen et al. 2018); see
  `softmax_features`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.spec import AttentionInputs, AttentionSpec, accumulation_dtype

Map = Callable[[Tensor], Tensor]
FeatureMap = str | Map | tuple[Map, Map]
ELEMENTWISE = ("elu", "relu", "identity")
NAMES = (*ELEMENTWISE, "softmax")
LEARNED = ("hedgehog", "rebased")  # learned maps, which cumulant.nn has


def apply_elementwise(name: str, x: Tensor) -> Tensor:
    if name == "elu":
        # This has slope 1 at 0 in every version of PyTorch; clamp has slope 0 there since 2.14.
        return torch.where(x > 0, x + 1, x.masked_fill(x > 0, 0).exp())
    return torch.relu(x) if name == "relu" else x


def check_feature_map(feature_map: FeatureMap, decay: str | None = None) -> None:
    """decay: the name of the argument that gives decays, if there is one."""
    if decay is not None and isinstance(feature_map, str) and feature_map == "softmax":
        raise ValueError(
            f"{decay}: feature_map 'softmax' divides by sums over keys that do not decay; use"
            " another feature map"
        )
    if isinstance(feature_map, str):
        if feature_map not in NAMES:
            choices = ", ".join(repr(name) for name in NAMES)
            hint = (
                "; learned maps by name are cumulant.nn.LinearAttention's"
                if feature_map in LEARNED
                else ""
            )
            raise ValueError(
                f"feature_map: expected one of {choices} or a callable, got {feature_map!r}{hint}"
            )
    elif isinstance(feature_map, tuple):
        if len(feature_map) != 2 or not all(callable(m) for m in feature_map):
            raise TypeError(
                "feature_map: expected a pair of callables, for queries and for keys, got another"
                " tuple"
            )
    elif not callable(feature_map):
        hint = "; a mask is passed as key_mask" if isinstance(feature_map, Tensor) else ""
        raise TypeError(
            f"feature_map: expected a name or a callable, got {type(feature_map).__name__}{hint}"
        )


def apply_maps(
    feature_map: Map | tuple[Map, Map], query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Features of queries and keys by one callable or a pair; the shapes are checked."""
    query_map, key_map = (
        feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    )
    q, k = _apply_map(query_map, "query", query), _apply_map(key_map, "key", key)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"feature_map: expected as many features for queries as for keys, got {q.shape[-1]} and"
            f" {k.shape[-1]}"
        )
    return q, k


def _apply_map(feature_map: Map, name: str, x: Tensor) -> Tensor:
    features = feature_map(x)
    if not isinstance(features, Tensor) or features.shape[:-1] != x.shape[:-1]:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"feature_map: expected [..., F] for {name} {list(x.shape)}, got {got}")
    return features


def softmax_features(
    inputs: AttentionInputs, spec: AttentionSpec, *, denominator: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of Shen's efficient attention, which need no further normaliser.

    ``out_i = Σ_f softmax(q_i)_f (Σ_j e^{k_jf} v_j) / (Σ_j e^{k_jf})``: each feature of the keys is
    a softmax over tokens. Causal sums run over j ≤ i.

    Exponentials are taken in fp32 (fp64 for fp64). A call that is neither causal nor packed, and
    has no state in or out, first subtracts each feature's largest key. Other calls subtract
    nothing, so their keys must lie between -87 and 88.

    Returns:
        The query's features, each divided by its feature's sum; the key's features ``e^k``; and the
        sums after the last token, ``[N, G, F]``.
    """
    query, key_mask, cu_seqlens = inputs.query, inputs.key_mask, inputs.cu_seqlens
    dtype, is_causal = accumulation_dtype(query), spec.is_causal
    key = inputs.key.to(dtype)
    if (
        not is_causal
        and denominator is None
        and not spec.returns_state
        and cu_seqlens is None
        and key.shape[2]
    ):
        seen = (
            key
            if key_mask is None
            else key.masked_fill(~key_mask[:, None, :, None], torch.finfo(dtype).min)
        )
        key = key - seen.detach().amax(2, keepdim=True)
    phi_k = key.exp()
    if key_mask is not None:
        phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0)
    if cu_seqlens is not None:
        sums, total = _packed_sums(phi_k, cu_seqlens, is_causal, denominator)
    else:
        first = 0 if denominator is None else denominator[:, :, None]
        total = phi_k.sum(2) if denominator is None else phi_k.sum(2) + denominator
        sums = phi_k.cumsum(2) + first if is_causal else total[:, :, None]
    H, G = query.shape[1], key.shape[1]
    if H > G:
        # index_select, not repeat: the exporter of PyTorch 2.11 would bound T by a repeated
        # tensor's strides.
        sums = sums.index_select(1, torch.arange(H, device=sums.device) // (H // G))
    phi_q = query.to(dtype).softmax(-1) / sums.masked_fill(sums == 0, 1)
    return phi_q, phi_k, total


def _packed_sums(
    phi_k: Tensor, cu_seqlens: Tensor, is_causal: bool, denominator: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each feature's sums at every token and at the end of every packed sequence."""
    bounds = cu_seqlens.tolist()
    sums, totals = [], []
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        part = phi_k[:, :, a:b]
        first = 0 if denominator is None else denominator[i]
        totals.append(part.sum(2)[0] + first)
        sums.append(part.cumsum(2) + (0 if denominator is None else first[:, None]))  # type: ignore[index]
        if not is_causal:
            sums[-1] = totals[-1][None, :, None].expand_as(part)
    sums.append(phi_k.new_ones(1, phi_k.shape[1], phi_k.shape[2] - bounds[-1], phi_k.shape[3]))
    return torch.cat(sums, 2), torch.stack(totals)
