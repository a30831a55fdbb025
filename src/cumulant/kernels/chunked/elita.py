"""ELiTA's attention as a recurrence, exact for logits of any size.

With ``m_t = log Σ_{j≤t} exp(c_j)``, the running mean ``u_t = Σ_{j≤t} exp(c_j - m_t) v_j`` moves towards each value by a
gate, ``u_t = u_{t-1} + a_t (v_t - u_{t-1})``, ``a_t = exp(c_t - m_t)``, and ``out_t = u_t + g_t (v_t - u_t)`` with
``g_t = σ(s_t - r_t - m_t)``. Logits enter only through a and g, two numbers a token, which are all that the backward
pass keeps beside inputs and outputs:

    Q_t = (1 - g_t) dout_t + (1 - a_{t+1}) Q_{t+1},   q_t the same of out_t · dout_t
    dv_t = a_t Q_t + g_t dout_t,   dc_t = a_t (Q_t · v_t - q_t),   ds_t = g_t dout_t · (v_t - out_t) = -dr_t

Shapes: ``c [B,G,T]``, ``r, s [B,G,R,T]`` for the R = H / G heads of a group, ``v [B,G,T,V]``. Where nothing has been
seen, m is -inf and u zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..transforms import mappable
from .passes import compute_dtype
from .recurrence import carried, scan, segment_maximum, steps

Past = tuple[Tensor, Tensor] | None  # m [B,G], u [B,G,V], in fp64


def _gates(
    c: Tensor, r: Tensor, s: Tensor, first: Tensor | None, past: Past, dtype: torch.dtype, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """a ``[B,G,T]``, g ``[B,G,R,T]``, and the last m ``[B,G]`` in fp64.

    Sums are of ``exp(c_j - M_t)`` with the running maximum M: differences of logits are taken before anything is
    rounded, so that large logits lose nothing. In fp64, so that light keys behind a heavy one are not lost, a few at a
    time, to rounding.
    """
    top = segment_maximum(c, first)
    if past is not None:
        top = torch.maximum(top, past[0][..., None])
    top = top.clamp(min=torch.finfo(top.dtype).min)  # where nothing was seen: exp(-inf - top) is zero
    before = torch.cat((top[..., :1] if past is None else past[0][..., None].to(top.dtype), top[..., :-1]), -1)
    decay = (before - top).double().exp()
    if first is not None:
        decay = decay.masked_fill(first, 0)
    new = (c - top).double().exp()
    total = scan(decay, new, torch.full_like(new[..., 0], 0.0 if past is None else 1.0), chunk)
    m = top + total.log()
    g = torch.sigmoid((s.double() - r.double() - m[:, :, None]).to(dtype)).masked_fill(s == -torch.inf, 0)
    a = new / total.clamp(min=0.5)  # sums are at least 1, but zero where nothing was seen
    return a.to(dtype), g, m[..., -1].clone()


def _forward(
    c: Tensor, r: Tensor, s: Tensor, v: Tensor, first: Tensor | None, past: Past, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out ``[B,H,T,V]``, a, g, and the state after all tokens."""
    (B, G, T, V), R, dtype = v.shape, r.shape[2], compute_dtype(v.dtype)
    out = _new_heads(v, G * R)
    y = out.unflatten(1, (G, R))
    u0 = v.new_zeros(B, G, V, dtype=torch.float64) if past is None else past[1]
    if T == 0 or B == 0:
        m = c.new_full((B, G), -torch.inf, dtype=torch.float64) if past is None else past[0].clone()
        return out, v.new_empty(B, G, T, dtype=dtype), v.new_empty(B, G, R, T, dtype=dtype), m, u0.clone()
    if T == 1 and past is not None:
        return _step(c, r, s, v, past, out)
    a, g, m = _gates(c, r, s, first, past, dtype, chunk)
    decay = _decay(a, first)
    each = decay.to(dtype)

    def advance(h: Tensor, at: slice) -> None:
        x, weight = v[:, :, at].to(dtype), a[:, :, at, None]
        h.lerp_(x, weight) if first is None else h.mul_(each[:, :, at, None]).addcmul_(x, weight)

    u, end = carried(advance, decay, u0, chunk, dtype=dtype)
    for at, n in steps(T, chunk):
        advance(u[:, :, :n], at)
        y[:, :, :, at] = torch.lerp(u[:, :, None, :n], v[:, :, None, at].to(dtype), g[:, :, :, at, None])
    return out, a, g, m, end


def _step(
    c: Tensor, r: Tensor, s: Tensor, v: Tensor, past: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_forward` of one token onto a state, without chunks. In fp64: in fp32 a mean would stop moving once its steps
    are smaller than its last digit."""
    x, dtype, (m0, u0) = v.double(), compute_dtype(v.dtype), past
    m = torch.logaddexp(m0[..., None], c.double())
    a = (c - m).exp().masked_fill(c == -torch.inf, 0)
    g = torch.sigmoid(s.double() - r.double() - m[:, :, None]).masked_fill(s == -torch.inf, 0)
    u = torch.lerp(u0[:, :, None], x, a[..., None])
    out.copy_(torch.lerp(u[:, :, None], x[:, :, None], g[..., None]).flatten(1, 2))
    return out, a.to(dtype), g.to(dtype), m.squeeze(-1).clone(), u.squeeze(2).clone()


def _decay(a: Tensor, first: Tensor | None) -> Tensor:
    decay = 1 - a.double()
    return decay if first is None else decay.masked_fill(first, 0)


def _new_heads(v: Tensor, heads: int) -> Tensor:
    """``[B, heads, T, V]``, the heads of a token side by side in memory, as projections write and read them. No
    view, as autograd would refuse to change one in place."""
    B, _, T, V = v.shape
    return v.new_empty_strided((B, heads, T, V), (T * heads * V, V, heads * V, 1))


def _backward(
    v: Tensor,
    first: Tensor | None,
    past: Past,
    out: Tensor,
    a: Tensor,
    g: Tensor,
    end: Tensor,
    dout: Tensor,
    dm: Tensor | None,
    du: Tensor | None,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Gradients of c ``[B,G,T]``, s ``[B,G,R,T]``, v ``[B,G,T,V]``, and of the state, whether there is one or not."""
    (B, G, T), R, dtype = a.shape, g.shape[2], a.dtype
    dy, y = dout.unflatten(1, (G, R)), out.unflatten(1, (G, R))
    dv, keep = _new_heads(v, G), 1 - g
    dc, ds, own = torch.empty_like(a), torch.empty_like(g), torch.empty_like(g)
    du = torch.zeros_like(end) if du is None else du
    dq = (du * end).sum(-1) if dm is None else (du * end).sum(-1) - dm
    if T == 0 or B == 0:
        return dc, ds, dv, torch.zeros_like(dq) if dm is None else dm.clone(), du.clone()
    for at, _ in steps(T, chunk):
        own[:, :, :, at] = (dy[:, :, :, at].to(dtype) * y[:, :, :, at]).sum(-1)
    decay = _decay(a, first)
    after = torch.cat((decay[:, :, 1:], torch.ones_like(decay[:, :, :1])), -1)
    each = after.to(dtype)
    q = scan(after, (keep * own).sum(2), dq.to(dtype), chunk, reverse=True)

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
        x, upstream, gate = v[:, :, at].to(dtype), dy[:, :, :, at].to(dtype), g[:, :, :, at]
        dc[:, :, at] = a[:, :, at] * ((h * x).sum(-1) - q[:, :, at])
        ds[:, :, :, at] = gate * ((upstream * x[:, :, None]).sum(-1) - own[:, :, :, at])
        dv[:, :, at] = torch.addcmul((upstream * gate[..., None]).sum(2), h, a[:, :, at, None])
    if past is None:
        return dc, ds, dv, dq, dpast
    reached = (past[0] != -torch.inf) * decay[:, :, 0]
    return dc, ds, dv, reached * ((dpast * past[1]).sum(-1) - q[:, :, 0]), reached[..., None] * dpast


@torch.library.custom_op("cumulant::elita_attention", mutates_args=())
def elita_attention(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output ``[B,H,T,V]``, the gates a ``[B,G,T]`` and g ``[B,G,R,T]``, and the state after all tokens: m ``[B,G]``
    and u ``[B,G,V]``, in fp64.

    key_logit ``[B,G,T]``, query_logit and self_logit ``[B,H,T]`` of one dtype, fp32 or fp64, -inf where a key or a
    token itself has no weight; first ``[T]``: True where a sequence begins that sees nothing before it.
    """
    past = None if log_weight is None or mean is None else (log_weight, mean)
    r, s = (x.unflatten(1, (value.shape[1], -1)) for x in (query_logit, self_logit))
    with torch.autocast(value.device.type, enabled=False):
        out, a, g, m, u = _forward(key_logit, r, s, value, first, past, chunk)
    return out, a.contiguous(), g.contiguous(), m, u.contiguous()


@elita_attention.register_fake
def _(
    key_logit: Tensor,
    query_logit: Tensor,
    self_logit: Tensor,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, G, T, V), H, dtype = value.shape, query_logit.shape[1], compute_dtype(value.dtype)
    return (
        _new_heads(value, H),
        value.new_empty((B, G, T), dtype=dtype),
        value.new_empty((B, G, H // G, T), dtype=dtype),
        value.new_empty((B, G), dtype=torch.float64),
        value.new_empty((B, G, V), dtype=torch.float64),
    )


@torch.library.custom_op("cumulant::elita_attention_backward", mutates_args=())
def elita_attention_backward(
    dout: Tensor,
    dlog_weight: Tensor | None,
    dmean: Tensor | None,
    value: Tensor,
    first: Tensor | None,
    log_weight: Tensor | None,
    mean: Tensor | None,
    out: Tensor,
    a: Tensor,
    g: Tensor,
    final_mean: Tensor,
    dtype: torch.dtype,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three logits, in `dtype`, of the values and of the state."""
    past = None if log_weight is None or mean is None else (log_weight, mean)
    with torch.autocast(value.device.type, enabled=False):
        found = _backward(value, first, past, out, a, g, final_mean, dout, dlog_weight, dmean, chunk)
    dc, ds, dv, dm, du = found
    ds = ds.flatten(1, 2).to(dtype)
    return dc.to(dtype), -ds, ds, dv, dm, du


@elita_attention_backward.register_fake
def _(dout, dlog_weight, dmean, value, first, log_weight, mean, out, a, g, final_mean, dtype, chunk):  # type: ignore[no-untyped-def]
    return (
        a.new_empty(a.shape, dtype=dtype),
        a.new_empty(out.shape[:3], dtype=dtype),
        a.new_empty(out.shape[:3], dtype=dtype),
        _new_heads(value, value.shape[1]),
        final_mean.new_empty(final_mean.shape[:2], dtype=torch.float64),
        final_mean.new_empty(final_mean.shape),
    )


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    key_logit, _, _, value, first, log_weight, mean, ctx.chunk = inputs
    out, a, g, _, final_mean = output
    ctx.mark_non_differentiable(a, g)
    ctx.dtype = key_logit.dtype
    ctx.save_for_backward(value, first, log_weight, mean, out, a, g, final_mean)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, _da, _dg, dm, du):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(saved[4])
    *grads, dm0, du0 = _mapped_backward(dout, dm, du, *saved, ctx.dtype, ctx.chunk)
    stateful = saved[2] is not None
    return *grads, None, dm0 if stateful else None, du0 if stateful else None, None


elita_attention.register_autograd(_differentiate, setup_context=_save)
_mapped_backward = mappable(elita_attention_backward)
attention = mappable(elita_attention, _save, _differentiate)
