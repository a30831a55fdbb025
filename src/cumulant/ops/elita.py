"""ELiTA's attention: a softmax over sums of a query's and a key's scalar logit."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.operators.elita import call_elita
from ..kernels.spec import ElitaInputs, ElitaSpec
from ..kernels.transforms import readable, without_autocast
from .checks import FLOATS, check_cu_seqlens, check_key_mask, check_state_tensors
from .cumulative import count_tokens
from .dispatch import Plan, make_plan, operation
from .sdpa_names import hint_at_names
from .state import ElitaState


@operation
@hint_at_names
def elita_attention(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: ElitaState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ElitaState]:
    """Causal attention whose logits are sums of a key's and a query's number, in O(T) time.

    Let c, r and s be the key, query and self logits. Row i is the softmax over ``s_i``, with value
    ``v_i``, and over all ``r_i + c_j`` for j ≤ i, with values ``v_j``::

        out_i = (e^{s_i} v_i + e^{r_i} Σ_{j≤i} e^{c_j} v_j) / (e^{s_i} + e^{r_i} Σ_{j≤i} e^{c_j})

    This is computed as ``out_i = g_i v_i + (1 - g_i) u_i`` with ``g_i = σ(s_i - r_i - m_i)``, where
    ``m_i = log Σ_{j≤i} e^{c_j}`` is the running log-sum and ``u_i = Σ_{j≤i} e^{c_j - m_i} v_j`` the
    running mean. Logits of any size are safe: their differences are taken in fp64, and no result
    of an exponential is larger than 1. Memory is O(T) as well.

    Args:
        key_logit: c, ``[B, G, T]``; fp16, bf16, fp32 or fp64, the same for all three logits; -inf
            gives a key no weight.
        query_logit: r, ``[B, H, T]``; the G key/value heads divide H, and query head h uses
            key/value head ``h // (H / G)``.
        self_logit: s, ``[B, H, T]``; -inf leaves the term out.
        value: ``[B, G, T, V]``, of any floating dtype. Sums are taken in fp32 (fp64 for fp64), and
            carried from call to call in fp64.
        key_mask: ``[B, T]`` bool, True = attend. No token sees a masked token, not even itself.
        cu_seqlens: ``[N + 1]`` int32/int64, offsets of N sequences packed end to end along T (then
            B = 1). The sequences do not see each other. Rows after the last offset are zero. States
            have N rows.
        state: m and u of earlier tokens, from `return_state`.
        return_state: return ``(out, state)``.
        impl: "auto", "native", "torch", "triton", "reference"; see `cumulant.explain`.

    Returns:
        ``[B, H, T, V]`` in value's dtype; zeros where a token has nothing to attend to.

    Raises:
        ValueError, TypeError: a message with the argument, the expected and the received value.
            Logits that are NaN or +inf are refused on the CPU. Other devices do not check them,
            because the check would wait for the device; their outputs become NaN.

    Source: Sharma 2023, "Efficient Linear-Time Attention Transformers" (ELiTA), its Attention2,
    without the clipping of logits.
    """
    _check_arguments(key_logit, query_logit, self_logit, value, key_mask, cu_seqlens, state)
    past = () if state is None else (state.log_weight, state.mean)
    logits = (key_logit, query_logit, self_logit)
    packed_states = cu_seqlens is not None and (state is not None or return_state)
    exact = value.double() if packed_states else value  # the sequences' states are among the values
    plan = make_plan("elita", impl, ElitaInputs(*logits, exact, None, *past), ElitaSpec())
    tokens = (*logits, value)
    if plan.impl == "reference":
        out, sums = _run_reference(tokens, key_mask, cu_seqlens, state)
    elif cu_seqlens is not None and packed_states:
        out, sums = _packed_with_states(plan, (*logits, exact), key_mask, cu_seqlens, state)
        out = out.to(value.dtype)
    else:
        first = _sequence_starts(value.shape[2], cu_seqlens)
        found = call_elita(
            plan.impl,
            ElitaInputs(*_mask_tokens(tokens, key_mask, cu_seqlens), first, *past),
            plan.spec,
        )
        out, sums = found.out, (found.final_log_weight, found.final_mean)
    if not return_state:
        return out
    return out, ElitaState(*sums, count_tokens(value, key_mask, cu_seqlens, state))


Tokens = tuple[Tensor, Tensor, Tensor, Tensor]  # three logits and the values
Sums = tuple[Tensor, Tensor]


def _mask_tokens(tokens: Tokens, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tokens:
    """Logits in at least fp32; tokens that are masked or after the last sequence have no weight."""
    c, r, s, v = tokens
    dtype = torch.promote_types(torch.promote_types(c.dtype, v.dtype), torch.float32)
    c, r, s = c.to(dtype), r.to(dtype), s.to(dtype)
    hidden = None if key_mask is None else ~key_mask
    if cu_seqlens is not None:
        slack = torch.arange(v.shape[2], device=v.device) >= cu_seqlens[-1]
        hidden = slack[None] if hidden is None else hidden | slack
    if hidden is None:
        return c, r, s, v
    heads = hidden[:, None]
    return (
        c.masked_fill(heads, -torch.inf),
        r.masked_fill(heads, 0),
        s.masked_fill(heads, -torch.inf),
        v.masked_fill(heads[..., None], 0),
    )


def _sequence_starts(length: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """True where a sequence begins, and at the first token after the last sequence: ``[T]``."""
    if cu_seqlens is None:
        return None
    first = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    return first.index_fill(0, cu_seqlens.long(), True)[:length]


def _packed_with_states(
    plan: Plan[ElitaSpec],
    tokens: Tokens,
    key_mask: Tensor | None,
    cu_seqlens: Tensor,
    state: ElitaState | None,
) -> tuple[Tensor, Sums]:
    """Packed sequences with states: each sequence gets an extra token before it and one after it.

    The first of these holds the sequence's state, and the second reads the mean at its end. Values
    are in fp64, as states are.
    """
    c, r, s, v = _mask_tokens(tokens, key_mask, cu_seqlens)
    G, T, N = c.shape[1], c.shape[2], cu_seqlens.shape[0] - 1
    bounds, index = cu_seqlens.long(), torch.arange(T, device=v.device)
    # the number of each token's sequence; N for the tokens after the last sequence
    number = torch.searchsorted(bounds[1:], index, right=True)
    place = torch.where(number < N, index + 2 * number + 1, index + 2 * N)
    starts = bounds[:-1] + 2 * torch.arange(N, device=v.device)
    ends = bounds[1:] + 2 * torch.arange(N, device=v.device) + 1
    size = T + 2 * N

    def spread(x: Tensor, empty: float, at_start: Tensor | None = None) -> Tensor:
        wide = x.new_full((1, x.shape[1], size, *x.shape[3:]), empty).index_copy(2, place, x)
        return (
            wide if at_start is None else wide.index_copy(2, starts, at_start.transpose(0, 1)[None])
        )

    c = spread(c.double(), -torch.inf, None if state is None else state.log_weight)
    values = spread(v, 0.0, None if state is None else state.mean)
    r, s = spread(r.double(), 0.0), spread(s.double(), -torch.inf)
    first = torch.zeros(size, dtype=torch.bool, device=v.device).index_fill(0, starts, True)
    first = first | (torch.arange(size, device=v.device) == bounds[-1] + 2 * N)
    out = call_elita(plan.impl, ElitaInputs(c, r, s, values, first), plan.spec).out
    mean = (
        out[0, :: out.shape[1] // G]
        .index_select(1, ends)
        .transpose(0, 1)
        .clone(memory_format=torch.contiguous_format)
    )
    return out.index_select(2, place), (_log_sums(c[0], first, N), mean)


def _log_sums(c: Tensor, first: Tensor, N: int) -> Tensor:
    """``log Σ exp(c)`` of N segments of ``c [G, T]``, which begin where `first` is True."""
    segment = (first.cumsum(0) - 1).expand_as(c)
    low = torch.finfo(c.dtype).min
    top = c.new_full((c.shape[0], N + 1), low).scatter_reduce(1, segment, c.detach(), "amax")
    total = torch.zeros_like(top).scatter_add(1, segment, (c - top.gather(1, segment)).exp())
    empty = total == 0
    return (
        (top + total.masked_fill(empty, 1).log())
        .masked_fill(empty, -torch.inf)[:, :N]
        .T.clone(memory_format=torch.contiguous_format)
    )


def _run_reference(
    tokens: Tokens, key_mask: Tensor | None, cu_seqlens: Tensor | None, state: ElitaState | None
) -> tuple[Tensor, Sums]:
    """The reference on the whole batch, or on each packed sequence separately."""
    with without_autocast(tokens[3]):
        if cu_seqlens is None:
            past = None if state is None else (state.log_weight, state.mean)
            return reference.elita_attention(*tokens, key_mask=key_mask, state=past)
        outs, ends, bounds = [], [], cu_seqlens.tolist()
        for i, (a, b) in enumerate(pairwise(bounds)):
            row = None if state is None else (state.log_weight[i : i + 1], state.mean[i : i + 1])
            mask = None if key_mask is None else key_mask[:, a:b]
            c, r, s, v = (x[:, :, a:b] for x in tokens)
            out, sums = reference.elita_attention(c, r, s, v, key_mask=mask, state=row)
            outs.append(out)
            ends.append(sums)
    value = tokens[3]
    outs.append(value.new_zeros(1, tokens[1].shape[1], value.shape[2] - bounds[-1], value.shape[3]))
    log_weights, means = zip(*ends, strict=True)
    return torch.cat(outs, 2), (torch.cat(log_weights), torch.cat(means))


def _check_arguments(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: ElitaState | None,
) -> None:
    logits = (("key_logit", key_logit), ("query_logit", query_logit), ("self_logit", self_logit))
    for name, x, letters, dims in (
        *((n, x, "[B, H, T]", 3) for n, x in logits),
        ("value", value, "[B, G, T, V]", 4),
    ):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor {letters}, got {type(x).__name__}")
        if x.dim() != dims:
            raise ValueError(f"{name}: expected {letters}, got {list(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")
        if x.device != value.device:
            raise TypeError(f"{name}: expected on {value.device} like value, got {x.device}")
    B, G, T, V = value.shape
    H = query_logit.shape[1]
    if key_logit.shape != (B, G, T):
        raise ValueError(
            f"key_logit: expected [B, G, T] = [{B}, {G}, {T}] as in value, got"
            f" {list(key_logit.shape)}"
        )
    for name, x in logits[1:]:
        if x.shape != (B, H, T):
            raise ValueError(
                f"{name}: expected [B, H, T] = [{B}, {H}, {T}], T as in value, got {list(x.shape)}"
            )
        if x.dtype != key_logit.dtype:
            raise TypeError(f"{name}: expected key_logit's dtype, {key_logit.dtype}, got {x.dtype}")
    if G == 0 or H % G:
        raise ValueError(
            f"key_logit: the {G} key/value heads (G) must divide the {H} query heads (H)"
        )
    check_key_mask(key_mask, B, T, value.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T, T, value.device)
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_state_tensors(
        state, ElitaState, {"log_weight": (rows, G), "mean": (rows, G, V)}, torch.float64, value
    )
    if value.device.type == "cpu" and readable(
        key_logit, query_logit, self_logit, key_mask, cu_seqlens
    ):
        _check_finite(logits, key_mask, cu_seqlens)


def _check_finite(
    logits: tuple[tuple[str, Tensor], ...], key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Refuse NaN and +inf in the logits of unmasked tokens, and -inf in query logits."""
    for name, logit in logits:
        x = logit.detach()[..., : logit.shape[-1] if cu_seqlens is None else int(cu_seqlens[-1])]
        if x.numel() == 0 or (
            x.amax() < torch.inf and (name != "query_logit" or x.amin() > -torch.inf)
        ):
            continue  # amax is NaN where any number is
        good = x < torch.inf
        if name == "query_logit":
            good &= x > -torch.inf
        if key_mask is not None:
            good |= ~key_mask[:, None, : x.shape[-1]]
        if not good.all():
            found = x[~good.expand_as(x)][0].item()
            kinds = "below +inf, -inf for no weight" if name != "query_logit" else "finite"
            raise ValueError(
                f"{name}: expected logits {kinds}, got {found}; an earlier layer may have"
                " overflowed"
            )
