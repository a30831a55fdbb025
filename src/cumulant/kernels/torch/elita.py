"""ELiTA's attention as a recurrence, exact for logits of any size.

With ``m_t = log Σ_{j≤t} exp(c_j)``, the running mean ``u_t = Σ_{j≤t} exp(c_j - m_t) v_j`` moves
towards each value by a gate, ``u_t = u_{t-1} + a_t (v_t - u_{t-1})``, ``a_t = exp(c_t - m_t)``, and
``out_t = u_t + g_t (v_t - u_t)`` with ``g_t = σ(s_t - r_t - m_t)``. The backward pass keeps the
inputs and two numbers a token: the odds of the gates, ``a / (1 - a)``, which tell both a and 1 - a
to the last digit. It forms the means again. With Q the gradient of u, and M that of m:

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

from dataclasses import replace

import torch
from torch import Tensor

from ..spec import ElitaInputs, ElitaOutputs, ElitaSpec, accumulation_dtype, new_heads
from ..transforms import without_autocast
from .recurrence import Advance, carried, scan, segment_maximum, steps

CHUNK = 8
Past = tuple[Tensor, Tensor] | None  # m [B,G], u [B,G,V], in fp64


def obstacle(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    return ""


def prepared(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaSpec:
    return replace(spec, chunk=CHUNK)


def describe(inputs: ElitaInputs, spec: ElitaSpec) -> str:
    if inputs.value.shape[2] == 1 and inputs.past is not None:
        return "one token onto a state"
    return f"chunks of {spec.chunk} tokens, side by side"


def _gates(
    c: Tensor, r: Tensor, s: Tensor, first: Tensor | None, past: Past, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The odds of a ``[B,G,T]``, of g ``[B,G,R,T]``, and the last m ``[B,G]``, in fp64.

    Sums are of ``exp(c_j - M_t)`` with the running maximum M: differences of logits are taken
    before anything is rounded, so that large logits lose nothing. In fp64, so that light keys
    behind a heavy one are not lost, a few at a time, to rounding.
    """
    top = segment_maximum(c, first)
    if past is not None:
        top = torch.maximum(top, past[0][..., None])
    top = top.clamp(
        min=torch.finfo(top.dtype).min
    )  # where nothing was seen: exp(-inf - top) is zero
    before = torch.cat(
        (top[..., :1] if past is None else past[0][..., None].to(top.dtype), top[..., :-1]), -1
    )
    decay = (before - top).double().exp()
    if first is not None:
        decay = decay.masked_fill(first, 0)
    new = (c - top).double().exp()
    start = torch.full_like(new[..., :1], 0.0 if past is None else 1.0)
    total = scan(decay, new, start[..., 0], chunk)
    m = top + total.log()
    key_odds = new / (decay * torch.cat((start, total[..., :-1]), -1))
    return key_odds.masked_fill(new == 0, 0), _own_odds(r, s, m), m[..., -1].clone()


def _own_odds(r: Tensor, s: Tensor, m: Tensor) -> Tensor:
    return (s.double() - r.double() - m[:, :, None]).exp().masked_fill(s == -torch.inf, 0)


def _share(odds: Tensor) -> Tensor:
    """a from a / (1 - a), which may be infinite; 1 - a is ``1 / (1 + odds)``."""
    return 1 / (1 + 1 / odds)


def _forward(
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
        return _step(c, r, s, v, past, out)
    key_odds, own_odds, m = _gates(c, r, s, first, past, chunk)
    a, decay, g = _share(key_odds).to(dtype), _decay(key_odds, first), _share(own_odds).to(dtype)
    advance = _towards(v, a, None if first is None else decay.to(dtype))
    u, end = carried(advance, decay, u0, chunk, dtype=dtype)
    for at, n in steps(T, chunk):
        advance(u[:, :, :n], at)
        y[:, :, :, at] = torch.lerp(
            u[:, :, None, :n], v[:, :, None, at].to(dtype), g[:, :, :, at, None]
        )
    return out, key_odds.to(dtype), own_odds.to(dtype), m, end


def _towards(v: Tensor, a: Tensor, decay: Tensor | None) -> Advance:
    """What moves means towards the values. decay: 1 - a, where it is not just that because
    sequences begin.
    """

    def advance(h: Tensor, at: slice) -> None:
        x, weight = v[:, :, at].to(h.dtype), a[:, :, at, None]
        h.lerp_(x, weight) if decay is None else h.mul_(decay[:, :, at, None]).addcmul_(x, weight)

    return advance


def _step(
    c: Tensor, r: Tensor, s: Tensor, v: Tensor, past: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_forward` of one token onto a state, without chunks. In fp64: in fp32 a mean would stop
    moving once its steps are smaller than its last digit."""
    x, dtype, (m0, u0) = v.double(), accumulation_dtype(v), past
    m = torch.logaddexp(m0[..., None], c.double())
    key_odds = (c.double() - m0[..., None]).exp().masked_fill(c == -torch.inf, 0)
    own_odds = _own_odds(r, s, m)
    u = torch.lerp(u0[:, :, None], x, _share(key_odds)[..., None])
    out.copy_(torch.lerp(u[:, :, None], x[:, :, None], _share(own_odds)[..., None]).flatten(1, 2))
    return out, key_odds.to(dtype), own_odds.to(dtype), m.squeeze(-1).clone(), u.squeeze(2).clone()


def _decay(key_odds: Tensor, first: Tensor | None) -> Tensor:
    """1 - a, in fp64; 0 where a sequence begins."""
    decay = 1 / (1 + key_odds.double())
    return decay if first is None else decay.masked_fill(first, 0)


def _backward(
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
    """Gradients of c ``[B,G,T]``, s ``[B,G,R,T]``, v ``[B,G,T,V]``, and of the state, whether there
    is one or not.
    """
    (B, G, T, V), R, dtype = v.shape, own_odds.shape[2], key_odds.dtype
    dm = v.new_zeros(B, G, dtype=torch.float64) if dm is None else dm
    du = v.new_zeros(B, G, V, dtype=torch.float64) if du is None else du
    dv, ds, by_key = new_heads(v, G, V), torch.empty_like(own_odds), torch.empty_like(key_odds)
    if T == 0 or B == 0:
        return by_key, ds, dv, dm.clone(), du.clone()
    dy, a, g, keep = (
        dout.unflatten(1, (G, R)),
        _share(key_odds),
        _share(own_odds),
        1 / (1 + own_odds),
    )
    decay = _decay(key_odds, first)
    apart = _distances(v, a, decay, first, None if past is None else past[1], chunk)
    after = torch.cat((decay[:, :, 1:], torch.ones_like(decay[:, :, :1])), -1)
    each = after.to(dtype)

    def advance(h: Tensor, at: slice) -> None:
        h.mul_(each[:, :, at, None])
        if R == 1:
            h.addcmul_(dy[:, :, 0, at].to(dtype), keep[:, :, 0, at, None])
        else:
            h.add_((dy[:, :, :, at] * keep[:, :, :, at, None]).sum(2))

    Q, dpast = carried(advance, after, du, chunk, reverse=True, dtype=dtype)
    for at, n in steps(T, chunk, reverse=True):
        h = Q[:, :, :n]
        advance(h, at)
        gap, upstream, gate = apart[:, :, at], dy[:, :, :, at].to(dtype), g[:, :, :, at]
        by_key[:, :, at] = a[:, :, at] * (h * gap).sum(-1)
        ds[:, :, :, at] = gate * keep[:, :, :, at] * (upstream * gap[:, :, None]).sum(-1)
        dv[:, :, at] = torch.addcmul((upstream * gate[..., None]).sum(2), h, a[:, :, at, None])
    later = torch.cat((by_key[:, :, 1:], torch.zeros_like(by_key[:, :, :1])), -1)
    M = scan(after, -ds.sum(2) - later, dm.to(dtype), chunk, reverse=True)
    dc = torch.addcmul(by_key, a, M)
    if past is None:
        return dc, ds, dv, dm.clone(), dpast
    reached, kept = past[0] != -torch.inf, decay[:, :, 0]
    return (
        dc,
        ds,
        dv,
        reached * (kept * M[:, :, 0] - by_key[:, :, 0]),
        (reached * kept)[..., None] * dpast,
    )


def _distances(
    v: Tensor, a: Tensor, decay: Tensor, first: Tensor | None, start: Tensor | None, chunk: int
) -> Tensor:
    """v - u ``[B,G,T,V]``, as 1 - a times the distance from the mean before: exact where a is near
    1.
    """
    found, each = a.new_empty(v.shape), decay.to(a.dtype)
    start = decay.new_zeros(*v.shape[:2], v.shape[3]) if start is None else start
    advance = _towards(v, a, None if first is None else each)
    u, _ = carried(advance, decay, start, chunk, dtype=a.dtype)
    for at, n in steps(v.shape[2], chunk):
        h = u[:, :, :n]
        found[:, :, at] = (v[:, :, at].to(h.dtype) - h).mul_(each[:, :, at, None])
        advance(h, at)
    return found


def forward(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    value = inputs.value
    r, s = (x.unflatten(1, (value.shape[1], -1)) for x in (inputs.query_logit, inputs.self_logit))
    with without_autocast(value):
        out, key_odds, own_odds, m, u = _forward(
            inputs.key_logit, r, s, value, inputs.first, inputs.past, spec.chunk
        )
    means = m.new_empty(0)
    own_odds = own_odds.contiguous().view(inputs.query_logit.shape)
    return ElitaOutputs(out, key_odds.contiguous(), own_odds, means, m, u.contiguous())


def backward(
    upstream: ElitaOutputs, inputs: ElitaInputs, outputs: ElitaOutputs, spec: ElitaSpec
) -> ElitaInputs:
    value, dtype = inputs.value, inputs.key_logit.dtype
    own_odds = outputs.own_odds.unflatten(1, (value.shape[1], -1))
    with without_autocast(value):
        dc, ds, dv, dm, du = _backward(
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
