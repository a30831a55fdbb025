"""Taylor attention: softmax's exponential replaced by its Taylor polynomial, and so linear in the
sequence length.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels import spec as kernels
from ..kernels.spec import AttentionSpec
from .checks import check_attention, check_linear_state
from .cumulative import attend, attention_inputs
from .dispatch import make_plan, operation
from .sdpa_names import hint_at_names
from .state import LinearState


def feature_count(dim: int, order: int, *, constant_term: bool = True) -> int:
    """Number of Taylor features F of a `dim`-dimensional vector up to degree `order`: C(dim +
    order, order), one fewer without the constant. A state holds F (V + 1) numbers a key/value head.

    >>> feature_count(16, 2)
    153
    """
    check_order(order)
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    return kernels.feature_count(dim, order, constant_term)


def check_order(order: object) -> None:
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
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention with weights ``w(x) = Σ_{p ≤ order} x^p / p!``, ``x = scale · q·k``, in O(T) time
    and memory.

    ``out_i = Σ_j w(x_ij) v_j / Σ_j w(x_ij)``, over j ≤ i if `is_causal`, else over all j.

    Order 2 weights are ``((x + 1)² + 1) / 2 ≥ ½``, so denominators are at least half the number of
    keys and no epsilon is needed. Odd orders, and any order without the constant, can have negative
    weights and vanishing denominators; nothing is clamped.

    Range: sums are taken in fp32 (fp64 for fp64). Results are exact to rounding while the sums over
    keys of ``|x|^order`` and of ``|k|^order |v|`` stay below 3.4e38; beyond, NaN or zeros come out.
    Any fp16 numbers fit orders 1 to 3 at K = 64, with values of ordinary size; order 4 does not.

    A value that is NaN or infinite reaches every output of later tokens, and earlier ones of its
    chunk (up to 128 tokens), as ``0 · NaN`` does in softmax attention.

    Args:
        query: ``[B, H, T, K]``; fp16, bf16, fp32 or fp64. Sums are taken in fp32 (fp64 for fp64).
        key: ``[B, G, S, K]``; the G key/value heads divide H, query head h uses key head
            ``h // (H / G)``.
        value: ``[B, G, S, V]``.
        order: degree of the polynomial, at least 1. Features grow as ``K^order / order!``: see
            `feature_count`.
        is_causal: query i sees keys up to i (and all of `state`); needs S = T.
        scale: factor of q·k, by default ``1 / sqrt(K)``.
        constant_term: False drops the term of degree 0 (Mercat's "subtract one").
        key_mask: ``[B, S]`` bool, True = attend. Masked keys count for nothing, whatever they hold;
            queries must be finite.
        cu_seqlens: ``[N + 1]`` int32/int64, offsets of N sequences packed end to end along T (then
            B = 1); they do not see each other. Rows after the last offset come out as zeros. States
            have N rows.
        state: sums over earlier keys, from `return_state`.
        return_state: return ``(out, state)``; not causal, the state is the whole context's, for
            later queries.
        impl: "auto", "native", "torch", "reference"; see `cumulant.explain`.

    Returns:
        ``[B, H, T, V]`` in query's dtype; a query with nothing to attend to gets zeros.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Sources: Arora et al. 2023, "Zoology" (Based); Mercat 2020, "Higher Order Linear Transformer";
    Keles et al. 2022, arXiv 2209.04881.
    """
    sizes = check_attention(
        query, key, value, is_causal=is_causal, key_mask=key_mask, cu_seqlens=cu_seqlens
    )
    check_order(order)
    features = feature_count(sizes.K, order, constant_term=constant_term)
    rows = sizes.B if cu_seqlens is None else len(cu_seqlens) - 1
    check_linear_state(state, rows, sizes, features, True, query)
    scale = sizes.K**-0.5 if scale is None else float(scale)
    inputs = attention_inputs(
        query, key, value, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state, normalize=True
    )
    spec = AttentionSpec(order, constant_term, "identity", scale, True, is_causal, return_state)
    out, end = attend(make_plan("attention", impl, inputs, spec), inputs, state)
    return (out, end) if return_state else out
