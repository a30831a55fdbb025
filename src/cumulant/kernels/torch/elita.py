"""ELiTA's attention as a recurrence, exact for logits of any size.

With ``m_t = log Σ_{j≤t} exp(c_j)``, the running mean ``u_t = Σ_{j≤t} exp(c_j - m_t) v_j`` moves
towards each value by a gate, ``u_t = u_{t-1} + a_t (v_t - u_{t-1})``, ``a_t = exp(c_t - m_t)``, and
``out_t = u_t + g_t (v_t - u_t)`` with ``g_t = σ(s_t - r_t - m_t)``. The backward pass keeps the
inputs and two numbers a token: the odds of the gates, ``a / (1 - a)``. Both a and 1 - a follow from
them to the last digit. It forms the means again. With Q the gradient of u, and M that of m:

    Q_t = (1 - g_t) dout_t + (1 - a_{t+1}) Q_{t+1},   dv_t = a_t Q_t + g_t dout_t
    ds_t = g_t (1 - g_t) dout_t · (v_t - u_t) = -dr_t
    b_t  = a_t Q_t · (v_t - u_t)
    M_t  = -ds_t - b_{t+1} + (1 - a_{t+1}) M_{t+1}
    dc_t = b_t + a_t M_t

Values enter by their distance from the mean, ``v_t - u_t = (1 - a_t) (v_t - u_{t-1})``. So the
gradient of a logit that hardly matters is a small product, and not a difference of large sums.

Shapes: ``c [B,G,T]``, ``r, s [B,G,R,T]`` for the R = H / G heads of a group, ``v [B,G,T,V]``. Where
nothing has been seen, m is -inf and u zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import ElitaInputs, ElitaOutputs, ElitaSpec, accumulation_dtype, new_heads
from ..transforms import without_autocast
from .recurrence import Advance, carry_chunks, scan_tokens, segment_maximum, token_steps

CHUNK = 8
Past = tuple[Tensor, Tensor] | None  # m [B,G], u [B,G,V], in fp64


def obstacle(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    return ""


def prepared(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaSpec:
    return spec._replace(chunk=CHUNK)


def describe(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    if inputs.value.shape[2] == 1 and inputs.past is not None:
        return "one token onto a state"
    return f"chunks of {spec.chunk} tokens, side by side"


def _gate_odds(
    c: Tensor, r: Tensor, s: Tensor, first: Tensor | None, past: Past, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The odds of a ``[B,G,T]``, of g ``[B,G,R,T]``, and the last m ``[B,G]``, in fp64.

    The sums are of ``exp(c_j - M_t)`` with the running maximum M. Differences of logits are taken
    before anything is rounded, so large logits lose nothing. In fp32, many light keys behind a
    heavy one would each be rounded away.
    """
    top = segment_maximum(c, first)
    if past is not None:
        top = torch.maximum(top, past[0][..., None])
    # A finite maximum where nothing was seen, so that exp(-inf - top) is zero and not NaN.
    top = top.clamp(min=torch.finfo(top.dtype).min)
    before = torch.cat(
        (top[..., :1] if past is None else past[0][..., None].to(top.dtype), top[..., :-1]), -1
    )
    decay = (before - top).double().exp()
    if first is not None:
        decay = decay.masked_fill(first, 0)
    new = (c - top).double().exp()
    start = torch.full_like(new[..., :1], 0.0 if past is None else 1.0)
    total = scan_tokens(decay, new, start[..., 0], chunk)
    m = top + total.log()
    key_odds = new / (decay * torch.cat((start, total[..., :-1]), -1))
    return key_odds.masked_fill(new == 0, 0), _own_odds(r, s, m), m[..., -1].clone()


def _own_odds(r: Tensor, s: Tensor, m: Tensor) -> Tensor:
    """The odds of g, in fp64: ``exp(s - r - m)``."""
    return (s.double() - r.double() - m[:, :, None]).exp().masked_fill(s == -torch.inf, 0)


def _gate_from_odds(odds: Tensor) -> Tensor:
    """a from its odds a / (1 - a), which may be infinite; 1 - a is ``1 / (1 + odds)``."""
    return 1 / (1 + 1 / odds)


def _attend(
    c: Tensor, r: Tensor, s: Tensor, v: Tensor, first: Tensor | None, past: Past, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out ``[B,H,T,V]``, the odds of a and g, and the state after all tokens."""
    (B, G, T, V), R, dtype = v.shape, r.shape[2], accumulation_dtype(v)
    out = new_heads(v, G * R, V)
    y = out.unflatten(1, (G, R))
    u0 = v.new_zeros(B, G, V, dtype=torch.float64) if past is None else past[1]
    if T == 0 or B == 0:
        m = c.new_full((B, G), -torch.inf, dtype=torch.float64) if past is None else past[0].clone()
        return (
            out,
            v.new_empty(B, G, T, dtype=dtype),
            v.new_empty(B, G, R, T, dtype=dtype),
            m,
            u0.clone(),
        )
    if T == 1 and past is not None:
        return _step_token(c, r, s, v, past, out)
    key_odds, own_odds, m = _gate_odds(c, r, s, first, past, chunk)
    a, decay, g = (
        _gate_from_odds(key_odds).to(dtype),
        _mean_decay(key_odds, first),
        _gate_from_odds(own_odds).to(dtype),
    )
    advance = _mean_update(v, a, None if first is None else decay.to(dtype))
    u, end = carry_chunks(advance, decay, u0, chunk, dtype=dtype)
    for at, n in token_steps(T, chunk):
        advance(u[:, :, :n], at)
        y[:, :, :, at] = torch.lerp(
            u[:, :, None, :n], v[:, :, None, at].to(dtype), g[:, :, :, at, None]
        )
    return out, key_odds.to(dtype), own_odds.to(dtype), m, end


def _mean_update(v: Tensor, a: Tensor, decay: Tensor | None) -> Advance:
    """The step ``u += a (v - u)``; with `decay`, zero at first tokens, ``u = decay u + a v``."""

    def advance(h: Tensor, at: slice) -> None:
        x, weight = v[:, :, at].to(h.dtype), a[:, :, at, None]
        h.lerp_(x, weight) if decay is None else h.mul_(decay[:, :, at, None]).addcmul_(x, weight)

    return advance


def _step_token(
    c: Tensor, r: Tensor, s: Tensor, v: Tensor, past: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_attend` of one token onto a state, without chunks.

    It is in fp64: an fp32 mean would stop moving once its steps are smaller than its last digit.
    """
    x, dtype, (m0, u0) = v.double(), accumulation_dtype(v), past
    m = torch.logaddexp(m0[..., None], c.double())
    key_odds = (c.double() - m0[..., None]).exp().masked_fill(c == -torch.inf, 0)
    own_odds = _own_odds(r, s, m)
    u = torch.lerp(u0[:, :, None], x, _gate_from_odds(key_odds)[..., None])
    out.copy_(
        torch.lerp(u[:, :, None], x[:, :, None], _gate_from_odds(own_odds)[..., None]).flatten(1, 2)
    )
    return out, key_odds.to(dtype), own_odds.to(dtype), m.squeeze(-1).clone(), u.squeeze(2).clone()


def _mean_decay(key_odds: Tensor, first: Tensor | None) -> Tensor:
    """1 - a, in fp64; 0 where a sequence begins."""
    decay = 1 / (1 + key_odds.double())
    return decay if first is None else decay.masked_fill(first, 0)


def _gradients(
    v: Tensor,
    first: Tensor | None,
    past: Past,
    key_odds: Tensor,
    own_odds: Tensor,
    dout: Tensor,
    dm: Tensor | None,
    du: Tensor | None,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of c ``[B,G,T]``, s ``[B,G,R,T]``, v ``[B,G,T,V]``, m and u of the state.

    The formulas are at the top of the file. A call without a state gets a gradient for one too.
    """
    (B, G, T, V), R, dtype = v.shape, own_odds.shape[2], key_odds.dtype
    dm = v.new_zeros(B, G, dtype=torch.float64) if dm is None else dm
    du = v.new_zeros(B, G, V, dtype=torch.float64) if du is None else du
    dv, ds, by_key = new_heads(v, G, V), torch.empty_like(own_odds), torch.empty_like(key_odds)
    if T == 0 or B == 0:
        return by_key, ds, dv, dm.clone(), du.clone()
    dy, a = dout.unflatten(1, (G, R)), _gate_from_odds(key_odds)
    g, keep = _gate_from_odds(own_odds), 1 / (1 + own_odds)
    # decay = 1 - a_t in fp64, because `carry_chunks` multiplies many of them. It is zero at a first
    # token, so no gradient crosses into another sequence. gap below is v_t - u_t.
    decay = _mean_decay(key_odds, first)
    gaps = _distances_from_mean(v, a, decay, first, None if past is None else past[1], chunk)
    # Q_t takes the factor of the token after it, 1 - a_{t+1}. The last token's is 1, because du is
    # the gradient at the last mean itself.
    after = torch.cat((decay[:, :, 1:], torch.ones_like(decay[:, :, :1])), -1)
    advance = _mean_gradient_update(dy, keep, after.to(dtype))
    Q, dpast = carry_chunks(advance, after, du, chunk, reverse=True, dtype=dtype)
    for at, n in token_steps(T, chunk, reverse=True):
        h = Q[:, :, :n]
        advance(h, at)
        gap, upstream, gate = gaps[:, :, at], dy[:, :, :, at].to(dtype), g[:, :, :, at]
        # b_t = a_t Q_t · (v_t - u_t), and ds_t = g_t (1 - g_t) dout_t · (v_t - u_t): products of
        # small numbers, never differences of large ones. dv_t = a_t Q_t + Σ_r g_t dout_t.
        by_key[:, :, at] = a[:, :, at] * (h * gap).sum(-1)
        ds[:, :, :, at] = gate * keep[:, :, :, at] * (upstream * gap[:, :, None]).sum(-1)
        dv[:, :, at] = torch.addcmul((upstream * gate[..., None]).sum(2), h, a[:, :, at, None])
    # M_t = -ds_t - b_{t+1} + (1 - a_{t+1}) M_{t+1}, from the last token, where it begins with dm.
    # It needs every b and ds, so it runs after the loop; then dc_t = b_t + a_t M_t.
    later = torch.cat((by_key[:, :, 1:], torch.zeros_like(by_key[:, :, :1])), -1)
    M = scan_tokens(after, -ds.sum(2) - later, dm.to(dtype), chunk, reverse=True)
    dc = torch.addcmul(by_key, a, M)
    if past is None:
        return dc, ds, dv, dm.clone(), dpast
    # The state is one more key before the first token: the same step with a_1, b_1, M_1 and Q_1.
    # An empty state has m = -inf and gets zeros.
    reached, kept = past[0] != -torch.inf, decay[:, :, 0]
    return (
        dc,
        ds,
        dv,
        reached * (kept * M[:, :, 0] - by_key[:, :, 0]),
        (reached * kept)[..., None] * dpast,
    )


def _mean_gradient_update(dy: Tensor, keep: Tensor, after: Tensor) -> Advance:
    """The step ``Q_t = (1 - a_{t+1}) Q_{t+1} + Σ (1 - g_t) dout_t``, a sum over R heads."""

    def advance(h: Tensor, at: slice) -> None:
        h.mul_(after[:, :, at, None])
        if dy.shape[2] == 1:  # one fused operation, where a sum would only copy
            h.addcmul_(dy[:, :, 0, at].to(h.dtype), keep[:, :, 0, at, None])
        else:
            h.add_((dy[:, :, :, at] * keep[:, :, :, at, None]).sum(2))

    return advance


def _distances_from_mean(
    v: Tensor, a: Tensor, decay: Tensor, first: Tensor | None, start: Tensor | None, chunk: int
) -> Tensor:
    """v - u ``[B,G,T,V]``, exact also where a is near 1.

    It is 1 - a times the distance from the mean before; v - u itself would cancel there.
    """
    found, each = a.new_empty(v.shape), decay.to(a.dtype)
    start = decay.new_zeros(*v.shape[:2], v.shape[3]) if start is None else start
    advance = _mean_update(v, a, None if first is None else each)
    u, _ = carry_chunks(advance, decay, start, chunk, dtype=a.dtype)
    for at, n in token_steps(v.shape[2], chunk):
        h = u[:, :, :n]
        found[:, :, at] = (v[:, :, at].to(h.dtype) - h).mul_(each[:, :, at, None])
        advance(h, at)
    return found


def forward(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    value = inputs.value
    r, s = (x.unflatten(1, (value.shape[1], -1)) for x in (inputs.query_logit, inputs.self_logit))
    with without_autocast(value):
        out, key_odds, own_odds, m, u = _attend(
            inputs.key_logit, r, s, value, inputs.first, inputs.past, spec.chunk
        )
    none = m.new_empty(0), m.new_empty(0)  # two, because an operator's results share no memory
    own_odds = own_odds.contiguous().view(inputs.query_logit.shape)
    return ElitaOutputs(out, key_odds.contiguous(), own_odds, *none, m, u.contiguous())


def backward(
    upstream: ElitaOutputs, inputs: ElitaInputs, outputs: ElitaOutputs, spec: ElitaSpec
) -> ElitaInputs:
    value, dtype = inputs.value, inputs.key_logit.dtype
    own_odds = outputs.own_odds.unflatten(1, (value.shape[1], -1))
    with without_autocast(value):
        dc, ds, dv, dm, du = _gradients(
            value,
            inputs.first,
            inputs.past,
            outputs.key_odds,
            own_odds,
            upstream.out,
            upstream.final_log_weight,
            upstream.final_mean,
            spec.chunk,
        )
    ds = ds.flatten(1, 2).to(dtype)
    return ElitaInputs(
        dc.to(dtype), -ds, ds, dv, None, *((dm, du) if inputs.past is not None else ())
    )
