"""Code shared by linear and Taylor attention: running a plan, and counting tokens in states."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import reference
from ..kernels.operators.attention import call_attention
from ..kernels.spec import AttentionInputs, AttentionOutputs, AttentionSpec
from ..kernels.transforms import without_autocast
from .dispatch import Plan
from .feature_maps import apply_elementwise
from .state import ElitaState, LinearState, MixedChunkState


def initial_sums(state: LinearState | None, normalize: bool) -> tuple[Tensor | None, Tensor | None]:
    """The numerator and denominator that come in; None where there is none."""
    if state is None:
        return None, None
    return state.numerator, state.denominator if normalize else None


def run_plan(
    plan: Plan[AttentionSpec], inputs: AttentionInputs, state: LinearState | None
) -> tuple[Tensor, LinearState]:
    """Output ``[B, H, T, V]`` in query's dtype, and the state after these keys.

    state: the state before these keys. The new state's sums are empty if the plan returns none.
    """
    by_reference = plan.impl == "reference"
    found = _run_reference(plan.spec, inputs) if by_reference else _run_kernel(plan, inputs)
    denominator = found.final_denominator if plan.spec.normalize else None
    position = count_tokens(inputs.key, inputs.key_mask, inputs.cu_seqlens, state)
    return found.out.to(inputs.query.dtype), LinearState(
        found.final_numerator, denominator, position
    )


def _run_kernel(plan: Plan[AttentionSpec], inputs: AttentionInputs) -> AttentionOutputs:
    if inputs.value.shape[3] > 0:
        return call_attention(plan.impl, inputs, plan.spec)
    # Kernels need at least one channel, so one of zeros is added here and removed below.
    numerator = None if inputs.numerator is None else pad(inputs.numerator, (0, 1))
    found = call_attention(
        plan.impl, inputs._replace(value=pad(inputs.value, (0, 1)), numerator=numerator), plan.spec
    )
    return found._replace(out=found.out[..., :0], final_numerator=found.final_numerator[..., :0])


def _run_reference(spec: AttentionSpec, inputs: AttentionInputs) -> AttentionOutputs:
    query_features = None
    if spec.order:
        features = reference.taylor_features(spec.order, spec.constant_term)
        similarity = reference.taylor_similarity(spec.order, spec.constant_term)
    else:
        features = partial(apply_elementwise, spec.activation)
        query_features = (
            reference.level_features(features, spec.activation == "elu")
            if spec.normalize
            else features
        )
        similarity = lambda q, k: reference.dot_similarity(query_features(q), features(k))  # noqa: E731
    run = partial(
        reference.quadratic_attention,
        similarity=similarity,
        features=features,
        query_features=query_features,
        normalize=spec.normalize,
        is_causal=spec.is_causal,
    )
    query, key, value, cu_seqlens = inputs.query, inputs.key, inputs.value, inputs.cu_seqlens
    past = None if inputs.numerator is None else (inputs.numerator, inputs.denominator)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    masks: dict[str, Any] = {
        "key_mask": inputs.key_mask,
        "state": past,
        "log_decay": inputs.log_decay,
    }
    with without_autocast(query):
        scaled = query.to(dtype) * spec.scale
        if cu_seqlens is None:
            out, sums = run(scaled, key, value, **masks)
        else:
            out, sums = reference.packed(run, scaled, key, value, cu_seqlens, **masks)
    return AttentionOutputs(
        out, out.new_empty(0), sums[0], out.new_empty(0) if sums[1] is None else sums[1]
    )


def count_tokens(
    key: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: LinearState | MixedChunkState | ElitaState | None,
) -> Tensor:
    """Keys seen so far, one count for each sequence; masked keys do not count."""
    if cu_seqlens is not None:
        if key_mask is None:
            count = cu_seqlens.diff().long()
        else:
            running = torch.nn.functional.pad(key_mask[0].long().cumsum(0), (1, 0))
            count = running[cu_seqlens.long()].diff()
    elif key_mask is not None:
        count = key_mask.sum(-1)
    else:
        count = torch.full((key.shape[0],), key.shape[2], dtype=torch.int64, device=key.device)
    return count if state is None else count + state.position
