"""The operator of mixed chunk attention on the native kernels; its arguments and results are those of the chunked one,
without dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..transforms import mappable
from .library import (
    TYPES,
    Held,
    MixedChunk,
    array,
    call,
    check_inputs,
    instruction_set,
    need,
    pointer,
    real,
    threads,
    unwatched,
)

ACTIVATIONS = ("relu2", "laplace")


def _slots(
    rows: int, tokens: int, key_mask: Tensor | None, cu_seqlens: Tensor | None, fill: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """What stands in each slot of every sequence, one sequence after another, and where each begins ``[N + 1]``:
    the number of a token, or -1 - slot for one of the open group that came in."""
    fills = [0] * rows if fill is None else fill.tolist()
    if key_mask is None and cu_seqlens is None and len(set(fills)) == 1:
        place, old = torch.arange(rows * tokens), fills[0]
        if old:
            slots = torch.arange(-1, -1 - old, -1).expand(rows, old)
            place = torch.cat((slots, place.view(rows, tokens)), 1).flatten()
        return place, torch.arange(rows + 1) * (old + tokens)
    place = torch.arange(rows * tokens)
    if cu_seqlens is None:
        N, owner = rows, place // max(tokens, 1)
        seen = torch.ones_like(place, dtype=torch.bool)
    else:
        N, owner = cu_seqlens.shape[0] - 1, torch.searchsorted(cu_seqlens.long(), place, right=True) - 1
        seen = owner < cu_seqlens.shape[0] - 1
    if key_mask is not None:
        seen &= key_mask.flatten()
    place, owner = place[seen], owner[seen]
    if fill is not None:
        slots = (torch.arange(group_size) < fill[:, None]).nonzero()
        owner, order = torch.cat((slots[:, 0], owner)).sort(stable=True)
        place = torch.cat((-1 - slots[:, 1], place))[order]
    bounds = torch.nn.functional.pad(torch.bincount(owner, minlength=N).cumsum(0), (1, 0))
    return place, bounds


class _Call(Held):
    """The arguments of one call."""

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        bias: Tensor | None,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        past: tuple[Tensor | None, ...],
        options: tuple[int, str, bool, bool, int],
    ):
        quad_query, quad_key, lin_query, lin_key, value = inputs
        group_size, activation, is_causal, reduce_groups, span = options
        (B, H, T, K), (_, G, _, V), L = quad_query.shape, value.shape, lin_query.shape[3]
        check_inputs(
            quad_query=(quad_query, (B, H, T, K)),
            quad_key=(quad_key, (B, G, T, K)),
            lin_query=(lin_query, (B, H, T, L)),
            lin_key=(lin_key, (B, G, T, L)),
            value=(value, (B, G, T, V)),
        )
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        need(G > 0 and H % G == 0, "quad_key", f"heads that divide quad_query's {H}", G)
        need(0 < group_size < 2**31, "group_size", "at least 1, below 2**31", group_size)
        need(activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", activation)
        need(span >= 1, "span", "at least 1", span)
        if key_mask is not None:
            need(key_mask.shape == (B, T), "key_mask", [B, T], list(key_mask.shape))
        if bias is not None:
            need(
                bias.shape in ((1, group_size, group_size), (H, group_size, group_size)),
                "bias",
                "[1 or H, g, g]",
                bias.shape,
            )
        if cu_seqlens is not None:
            cu = cu_seqlens.tolist()
            rising = cu == sorted(cu) and len(cu) > 0 and cu[0] == 0 and cu[-1] <= T
            need(rising and B == 1, "cu_seqlens", f"offsets that rise from 0 to at most {T}, and B = 1", cu)
        super().__init__(value.dtype)
        *sums, position = past
        for name, x, shape in zip(
            ("numerator", "open_quad_key", "open_lin_key", "open_value"),
            sums,
            self.state(N, G, group_size, K, L, V),
            strict=True,
        ):
            need((x is None) == (position is None), name, "all parts of the state or none", x)
            if x is not None:
                check_inputs(**{name: (x, shape)})
        fill = None if position is None else position.long() % group_size
        need(fill is None or fill.shape == (N,), "position", [N], fill)
        self.shapes = self.state(N, G, group_size, K, L, V)
        work = B * H * T * (2 * L * V + group_size * (K + V))
        m = self.arguments = MixedChunk(
            B, N, H, G, T, K, L, V, group_size, span,
            TYPES[value.dtype], ACTIVATIONS.index(activation), is_causal, is_causal or reduce_groups,
            0 if bias is None else bias.shape[0], threads(work), instruction_set(),
        )  # fmt: skip
        m.quad_query, m.quad_key, m.lin_query, m.lin_key, m.value = (self.array(x) for x in inputs)
        m.index, m.bounds = (self.pointer(x, torch.int64) for x in _slots(B, T, key_mask, cu_seqlens, fill, group_size))
        m.numerator, m.open_quad_key, m.open_lin_key, m.open_value = (self.pointer(x, self.real) for x in sums)
        if bias is not None:
            m.bias = self.pointer(bias, self.real)
            if T > 1:  # for one row of it a copy would cost more than it saves
                m.bias_turned = self.pointer(bias.mT, self.real)

    @staticmethod
    def state(N: int, G: int, size: int, K: int, L: int, V: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the four parts."""
        return (N, G, L, V), (N, G, size, K), (N, G, size, L), (N, G, size, V)


def _covered(key_mask: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Whether every token is in some sequence, and so every row of the results gets written."""
    return key_mask is None and cu_seqlens is None


def _forward(
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    open_quad_key: Tensor | None,
    open_lin_key: Tensor | None,
    open_value: Tensor | None,
    position: Tensor | None,
    want_state: bool,
    group_size: int,
    activation: str,
    is_causal: bool,
    reduce_groups: bool,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output ``[B,H,T,V]``, and the state's sums and open group: empty when not wanted."""
    inputs = (quad_query, quad_key, lin_query, lin_key, value)
    past = (numerator, open_quad_key, open_lin_key, open_value, position)
    c = _Call(inputs, bias, key_mask, cu_seqlens, past, (group_size, activation, is_causal, reduce_groups, span))
    need(is_causal or not want_state, "want_state", "False, if not causal", want_state)
    m = c.arguments
    shape = (*quad_query.shape[:3], value.shape[3])
    out = value.new_empty(shape) if _covered(key_mask, cu_seqlens) else value.new_zeros(shape)
    final = [value.new_empty(x if want_state else (0,), dtype=c.real) for x in c.shapes]
    m.out = array(out)
    if want_state:
        m.final_numerator, m.final_quad_key, m.final_lin_key, m.final_value = (pointer(x) for x in final)
    call("cumulant_mixed_chunk_forward", m)
    S, rest_quad_key, rest_lin_key, rest_value = final
    return out, S, rest_quad_key, rest_lin_key, rest_value


mixed_chunk_attention = torch.library.custom_op(
    "cumulant::native_mixed_chunk_attention", _forward, mutates_args=(), device_types="cpu"
)


def attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`mixed_chunk_attention`, without an operator's cost where nothing watches."""
    return (_forward if unwatched(*arguments[:13]) else _mapped)(*arguments)


@mixed_chunk_attention.register_fake
def _(quad_query, quad_key, lin_query, lin_key, value, bias, key_mask, cu_seqlens, *rest):  # type: ignore[no-untyped-def]
    want_state, g = rest[5:7]
    B, G, _, V = value.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = _Call.state(N, G, g, quad_key.shape[-1], lin_key.shape[-1], V) if want_state else ((0,),) * 4
    out = value.new_empty(B, quad_query.shape[1], value.shape[2], V)
    return out, *(value.new_empty(shape, dtype=real(value.dtype)) for shape in shapes)


@torch.library.custom_op("cumulant::native_mixed_chunk_attention_backward", mutates_args=(), device_types="cpu")
def mixed_chunk_attention_backward(
    dout: Tensor,
    dnumerator: Tensor | None,
    dopen_quad_key: Tensor | None,
    dopen_lin_key: Tensor | None,
    dopen_value: Tensor | None,
    quad_query: Tensor,
    quad_key: Tensor,
    lin_query: Tensor,
    lin_key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    numerator: Tensor | None,
    open_quad_key: Tensor | None,
    open_lin_key: Tensor | None,
    open_value: Tensor | None,
    position: Tensor | None,
    group_size: int,
    activation: str,
    is_causal: bool,
    reduce_groups: bool,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, the bias, and the four parts of the state; empty for what is None."""
    inputs = (quad_query, quad_key, lin_query, lin_key, value)
    past = (numerator, open_quad_key, open_lin_key, open_value, position)
    c = _Call(inputs, bias, key_mask, cu_seqlens, past, (group_size, activation, is_causal, reduce_groups, span))
    m = c.arguments
    new = torch.empty if _covered(key_mask, cu_seqlens) else torch.zeros
    grads = [new(x.shape, dtype=value.dtype, device=value.device) for x in inputs]
    dbias = value.new_zeros((0,) if bias is None else bias.shape, dtype=c.real)
    state = [value.new_zeros((0,) if x is None else x.shape, dtype=c.real) for x in past[:4]]
    check_inputs(dout=(dout, (*quad_query.shape[:3], value.shape[3])))
    names = ("dnumerator", "dopen_quad_key", "dopen_lin_key", "dopen_value")
    for name, x, shape in zip(names, (dnumerator, dopen_quad_key, dopen_lin_key, dopen_value), c.shapes, strict=True):
        if x is not None:
            check_inputs(**{name: (x, shape)})
    m.dout = c.array(dout)
    m.dquad_query, m.dquad_key, m.dlin_query, m.dlin_key, m.dvalue = (array(x) for x in grads)
    upstream = (dnumerator, dopen_quad_key, dopen_lin_key, dopen_value)
    m.dfinal_numerator, m.dfinal_quad_key, m.dfinal_lin_key, m.dfinal_value = (c.pointer(x, c.real) for x in upstream)
    if numerator is not None:
        m.dnumerator, m.dopen_quad_key, m.dopen_lin_key, m.dopen_value = (pointer(x) for x in state)
    call("cumulant_mixed_chunk_backward", m, None if bias is None else pointer(dbias))
    dbias = dbias if bias is None else dbias.mT.to(bias.dtype).contiguous()
    (dq, dk, dr, ds, dv), (dS, *rest) = grads, state
    return dq, dk, dr, ds, dv, dbias, dS, rest[0], rest[1], rest[2]


@mixed_chunk_attention_backward.register_fake
def _(dout, dS, dk, dl, dv, quad_query, quad_key, lin_query, lin_key, value, bias, mask, cu, S, k, l, v, *rest):  # type: ignore[no-untyped-def]
    wide = value.new_empty(0, dtype=real(value.dtype))
    inputs = (x.new_empty(x.shape) for x in (quad_query, quad_key, lin_query, lin_key, value))
    return *inputs, *(wide.clone() if x is None else x.new_empty(x.shape) for x in (bias, S, k, l, v))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:13])
    ctx.want_state, *ctx.options = inputs[13:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, *dstate):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    value, bias, numerator = tensors[4], tensors[5], tensors[8]
    if dout is None:
        dout = value.new_zeros(value.shape[0], tensors[0].shape[1], *value.shape[2:])
    if not ctx.want_state:
        dstate = (None,) * 4
    grads = _backward(dout, *dstate, *tensors, *ctx.options)
    state = grads[6:] if numerator is not None else (None,) * 4
    return *grads[:5], grads[5] if bias is not None else None, None, None, *state, *[None] * 7


mixed_chunk_attention.register_autograd(_differentiate, setup_context=_save)
_backward = mappable(mixed_chunk_attention_backward)
_mapped = mappable(mixed_chunk_attention, _save, _differentiate)
