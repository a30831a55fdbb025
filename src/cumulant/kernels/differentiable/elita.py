"""ELiTA's attention: log-sums and means chunk by chunk, relative to the largest logit so far."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import ElitaInputs, ElitaOutputs, ElitaSpec
from ..transforms import without_autocast

BLOCK = 64  # tokens whose weights exist at a time


def attention(inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    """Outputs and the state after all tokens; in fp64, and without the odds."""
    value, first, log_weight, mean = inputs.value, inputs.first, inputs.log_weight, inputs.mean
    (B, G, T, V), H = value.shape, inputs.query_logit.shape[1]
    with without_autocast(value):
        c, r, s = (x.double() for x in (inputs.key_logit, inputs.query_logit, inputs.self_logit))
        r, s, v = r.unflatten(1, (G, H // G)), s.unflatten(1, (G, H // G)), value.double()
        m = c.new_full((B, G), -torch.inf) if log_weight is None else log_weight
        u = v.new_zeros(B, G, V) if mean is None else mean
        number = None if first is None else first.cumsum(0)  # of each token's sequence
        outs, before = [value.new_zeros(B, H, 0, V)], None
        for start in range(0, T, BLOCK):
            at = slice(start, start + BLOCK)
            inside = None if number is None else number[at]
            m_all, u_all = _chunk(c[:, :, at], v[:, :, at], m, u, inside, before)
            g = _gate(s[:, :, :, at], r[:, :, :, at], m_all[:, :, None])[..., None]
            y = (1 - g) * u_all[:, :, None] + g * v[:, :, None, at]
            outs.append(y.flatten(1, 2).to(value.dtype))
            m, u = m_all[:, :, -1], u_all[:, :, -1]
            before = None if inside is None else inside[-1]
        none = m.new_empty(0)
        return ElitaOutputs(torch.cat(outs, 2), none, none, none, none, m.clone(), u.clone())


def _chunk(
    c: Tensor, v: Tensor, m: Tensor, u: Tensor, number: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-sums ``[B,G,C]`` and means ``[B,G,C,V]`` after every token, from those before the chunk;
    with the number of each token's sequence ``[C]``, and of the token before the chunk."""
    logits = torch.cat((m[..., None], c), -1)[:, :, None]  # what came before is one more key
    length = c.shape[-1]
    later = torch.ones(length, length + 1, dtype=torch.bool, device=c.device).triu(2)
    if number is not None:
        first = number[:1] * 0 if before is None else before[None]
        later = later | (number[:, None] != torch.cat((first, number)))
    logits = logits.expand(-1, -1, length, -1).masked_fill(later, -torch.inf)
    top = (
        logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(c.dtype).min)
    )  # cancels, so it is a constant
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    log_sums = (top + total.log()).masked_fill(empty, -torch.inf)[..., 0]
    return log_sums, (weights / total) @ torch.cat((u[:, :, None], v), 2)


def _gate(s: Tensor, r: Tensor, m: Tensor) -> Tensor:
    """σ(s - r - m): zero where a token has no weight for itself, one where there is no other."""
    nothing, alone = s == -torch.inf, m == -torch.inf
    x = s.masked_fill(nothing, 0) - r - m.masked_fill(alone, 0)
    return torch.sigmoid(x).masked_fill(alone, 1).masked_fill(nothing, 0)
