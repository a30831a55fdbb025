"""Taylor attention: the exponential of softmax becomes its Taylor polynomial."""

from __future__ import annotations

from torch import Tensor

from ..kernels import spec as kernels
from ..kernels.spec import AttentionInputs, AttentionSpec
from .checks import check_attention, check_linear_state
from .cumulative import initial_sums, run_plan
from .dispatch import make_plan, operation
from .repeated import recall, remember, signature
from .sdpa_names import hint_at_names
from .state import LinearState


def feature_count(dim: int, order: int, *, constant_term: bool = True) -> int:
    """The number F of Taylor features of a `dim`-dimensional vector up to degree `order`.

    ``F = C(dim + order, order)``, and one fewer without the constant. A state holds F (V + 1)
    numbers for each key/value head.

    >>> feature_count(16, 2)
    153
    """
    check_order(order)
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    return kernels.feature_count(dim, order, constant_term)


def check_order(order: object) -> None:
    """Check that the order is an integer of at least 1."""
    if not isinstance(order, int) or isinstance(order, bool) or order < 1:
        got = "a tensor; a mask is passed as key_mask" if isinstance(order, Tensor) else repr(order)
        raise ValueError(f"order: expected an integer of at least 1, got {got}")


@operation
@hint_at_names
def taylor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: int = 2,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    constant_term: bool = True,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention with weights ``Σ_{p ≤ order} x^p / p!``, ``x = scale · q·k``, in O(T) time.

    ``out_i = Σ_j w(x_ij) v_j / Σ_j w(x_ij)`` with ``w(x) = Σ_{p ≤ order} x^p / p!``, over j ≤ i if
    `is_causal`, else over all j. Memory is O(T) as well.

    Weights of order 2 are ``((x + 1)² + 1) / 2 ≥ ½``. So denominators are at least half the number
    of keys, and no epsilon is needed. Odd orders, and any order without the constant, can have
    negative weights and vanishing denominators; nothing is clamped.

    Results are exact to rounding while the sums over keys of ``|x|^order`` and of
    ``|k|^order |v|`` stay below 3.4e38. Beyond that, outputs are NaN or zero. With values of
    ordinary size and K = 64, all fp16 inputs are within this range for orders 1 to 3, but not for
    order 4.

    A NaN or infinite value reaches all later outputs, as ``0 · NaN`` does in softmax attention. It
    also reaches earlier outputs of its chunk, which has at most 128 tokens.

    Args:
        query: ``[B, H, T, K]``; fp16, bf16, fp32 or fp64. Sums are taken in fp32 (fp64 for fp64).
        key: ``[B, G, S, K]``; the G key/value heads divide H, and query head h uses key/value head
            ``h // (H / G)``.
        value: ``[B, G, S, V]``.
        order: degree of the polynomial, at least 1. The number of features grows as
            ``K^order / order!``; see `feature_count`.
        is_causal: query i sees keys up to i (and all of `state`); needs S = T.
        scale: factor of q·k, by default ``1 / sqrt(K)``.
        constant_term: False drops the term of degree 0 (Mercat's "subtract one").
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
        ``[B, H, T, V]`` in query's dtype; a query with nothing to attend to gets zeros.

    Raises:
        ValueError, TypeError: a message with the argument, the expected and the received value.

    Sources: Arora et al. 2023, "Zoology" (Based); Mercat 2020, "Higher Order Linear Transformer";
    Keles et al. 2022, arXiv 2209.04881.
    """
    options = "taylor", type(order) is int, order, is_causal, scale, constant_term, return_state
    masks = key_mask, cu_seqlens
    alike = signature((*options, impl), masks, query, key, value, log_decay, state)
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
    check_order(order)
    features = feature_count(sizes.K, order, constant_term=constant_term)
    rows = sizes.B if cu_seqlens is None else len(cu_seqlens) - 1
    check_linear_state(state, rows, sizes, features, True, query)
    scale = sizes.K**-0.5 if scale is None else float(scale)
    sums = initial_sums(state, normalize=True)
    inputs = AttentionInputs(query, key, value, key_mask, cu_seqlens, *sums, log_decay)
    spec = AttentionSpec(order, constant_term, "identity", scale, True, is_causal, return_state)
    plan = make_plan("attention", impl, inputs, spec)
    if repeated := remember(alike, plan, inputs, return_state):
        return repeated(query, key, value, log_decay, state)
    out, end = run_plan(plan, inputs, state)
    return (out, end) if return_state else out
