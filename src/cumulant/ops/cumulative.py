"""What linear and Taylor attention share: running the chosen implementation and keeping count in the state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.transforms import needs_formula, without_autocast
from .dispatch import Choice, automatic, native_obstacle, reasons, resolve
from .state import ElitaState, LinearState, MixedChunkState

CHUNK = 128
NATIVE_CHUNK = 64
SHORT_CHUNK = 48  # causal, without Taylor features: less is done inside chunks, beside small sums
SPAN = 512  # the fewest tokens that a thread of the native kernels takes when one sequence is shared out
MAX_NATIVE_ORDER = 8
MANY = 600  # features beyond which PyTorch's quadratic form of up to CHUNK tokens, which needs none, is the faster one


@dataclass(frozen=True)
class Kernel:
    """The attention kernel: elementwise `activation`, then its Taylor features up to `order` (0: none)."""

    order: int
    constant_term: bool
    activation: str
    scale: float
    normalize: bool
    is_causal: bool


def attend(
    impl: str,
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: LinearState | None,
    return_state: bool,
) -> tuple[Tensor, LinearState]:
    """Output ``[B, H, T, V]``, in query's dtype, and the state after these keys (meaningless unless `return_state`)."""
    if impl == "native" and value.shape[3] == 0:  # its kernels need a channel: one of zeros, taken away again
        wider = torch.nn.functional.pad(value, (0, 1))
        past = None if state is None else replace(state, numerator=torch.nn.functional.pad(state.numerator, (0, 1)))
        rest: dict[str, Any] = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "return_state": return_state}
        out, end = attend(impl, kernel, query, key, wider, state=past, **rest)
        return out[..., :0], replace(end, numerator=end.numerator[..., :0])
    numerator = None if state is None else state.numerator
    denominator = None if state is None or not kernel.normalize else state.denominator
    if impl == "reference":
        out, sums = _reference(kernel, query, key, value, key_mask, cu_seqlens, numerator, denominator)
    elif needs_formula(torch.compiler.is_compiling()):
        from ..kernels.differentiable import cumulative

        options = (kernel.order, kernel.constant_term, kernel.activation, kernel.scale, kernel.normalize)
        inputs = (query, key, value, key_mask, cu_seqlens, numerator, denominator)
        out, S, z = cumulative.attention(*inputs, *options, kernel.is_causal, CHUNK)
        sums = S, z if kernel.normalize else None
    elif impl == "native":
        from ..kernels.native.attention import attention

        out, _, S, z = attention(
            query,
            key,
            value,
            key_mask,
            cu_seqlens,
            numerator,
            denominator,
            return_state,
            kernel.order,
            kernel.constant_term,
            kernel.activation,
            kernel.scale,
            kernel.normalize,
            kernel.is_causal,
            _native_chunk(kernel.order, kernel.is_causal),
            SPAN,
        )
        sums = S, z if kernel.normalize else None
    else:
        from ..kernels.chunked import attention as chunked

        # In both directions the sums over many keys are kept for the backward pass, which else would sum them again, as
        # it does in compiled graphs, made for any length.
        long = cu_seqlens is None and not torch.compiler.is_compiling() and max(query.shape[2], key.shape[2]) > CHUNK
        out, _, S, z = chunked(
            query,
            key,
            value,
            key_mask,
            cu_seqlens,
            numerator,
            denominator,
            return_state or (long and not kernel.is_causal),
            kernel.order,
            kernel.constant_term,
            kernel.activation,
            kernel.scale,
            kernel.normalize,
            kernel.is_causal,
            CHUNK,
        )
        sums = S, z if kernel.normalize else None
    return out.to(query.dtype), LinearState(*sums, count_tokens(key, key_mask, cu_seqlens, state))


def choose(impl: str, query: Tensor, order: int, *, S: int, is_causal: bool, stateful: bool) -> tuple[str, str]:
    """The implementation to run, and why that is not the native one (empty if it is).

    stateful: a state goes in or out, or several sequences lie in one row.
    """
    obstacle = native_obstacle(query)
    if not obstacle and order > MAX_NATIVE_ORDER:
        obstacle = f"its kernels go up to order {MAX_NATIVE_ORDER}, and this is order {order}"
    elif not obstacle and order > 3 and math.comb(query.shape[-1] + order, order) >= 2**31:
        obstacle = f"its kernels go up to 2**31 features, and these are more: K = {query.shape[-1]}, order {order}"
    elif (
        not obstacle
        and impl == "auto"
        and automatic() == "auto"
        and order > 1
        and not stateful
        and not torch.compiler.is_compiling()
    ):
        T, features = query.shape[2], math.comb(query.shape[-1] + order, order)
        if features > MANY and T == S <= CHUNK and (not is_causal or T > NATIVE_CHUNK):
            obstacle = f"it would form {features} features, which take longer than all {T} x {S} weights"
    return resolve(impl, obstacle), obstacle


def _native_chunk(order: int, is_causal: bool) -> int:
    return min(NATIVE_CHUNK, SHORT_CHUNK) if is_causal and order == 0 else NATIVE_CHUNK


def plan(impl: str, query: Tensor, order: int, *, S: int, is_causal: bool, stateful: bool, features: int) -> Choice:
    """What would run. `stateful`: a state goes in or out."""
    chosen, obstacle = choose(impl, query, order, S=S, is_causal=is_causal, stateful=stateful)
    T = query.shape[2]
    chunk = _native_chunk(order, is_causal) if chosen == "native" else CHUNK
    one = chunk >= T and (is_causal if chosen == "native" else T == S and (is_causal or not stateful))
    work = f"one block of {T} tokens, the quadratic form" if one else f"chunks of {chunk} tokens, {features} features"
    return reasons(impl, work, obstacle)


def _reference(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    denominator: Tensor | None,
) -> tuple[Tensor, reference.Sums]:
    from .feature_maps import elementwise

    query_features = None
    if kernel.order:
        features = reference.taylor_features(kernel.order, kernel.constant_term)
        similarity = reference.taylor_similarity(kernel.order, kernel.constant_term)
    else:
        features = partial(elementwise, kernel.activation)
        query_features = (
            reference.level_features(features, kernel.activation == "elu") if kernel.normalize else features
        )
        similarity = lambda q, k: reference.dot_similarity(query_features(q), features(k))  # noqa: E731
    run = partial(
        reference.quadratic_attention,
        similarity=similarity,
        features=features,
        query_features=query_features,
        normalize=kernel.normalize,
        is_causal=kernel.is_causal,
    )
    state = None if numerator is None else (numerator, denominator)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with without_autocast(query):
        scaled = query.to(dtype) * kernel.scale
        if cu_seqlens is None:
            out, sums = run(scaled, key, value, key_mask=key_mask, state=state)
        else:
            out, sums = reference.packed(run, scaled, key, value, cu_seqlens, key_mask=key_mask, state=state)
    return out.to(query.dtype), sums


def count_tokens(
    key: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: LinearState | MixedChunkState | ElitaState | None,
) -> Tensor:
    """Keys seen so far, one count a sequence: what is masked does not count."""
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
