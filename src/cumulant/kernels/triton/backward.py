"""The backward pass of linear and Taylor attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec, new_heads
from . import device
from .call import Call, Sums


def _zeros(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.zeros_like(like)


class Gradients(Call):
    """The kernels' arguments of one backward call."""

    def __init__(
        self,
        upstream: AttentionOutputs,
        x: AttentionInputs,
        y: AttentionOutputs,
        spec: AttentionSpec,
    ):
        super().__init__(x, spec)
        # what was saved may have been expanded by `torch.func.vmap`
        self.y = AttentionOutputs(y.out, *(None if t is None else t.contiguous() for t in y[1:]))
        self.upstream = upstream
        self.dout = device.with_rows(upstream.out)
        past = upstream.final_numerator, upstream.final_denominator if spec.normalize else None
        if all(t is None for t in past):
            self.after: tuple[Tensor | None, Tensor | None] = None, None
        else:
            shapes = (self.N, self.G, self.size.F, self.V), (self.N, self.G, self.size.F)
            filled = (
                self.q.new_zeros(shape, dtype=x.dtype) if t is None else t.contiguous()
                for t, shape in zip(past, shapes)
            )  # fmt: skip
            self.after = tuple(filled)  # type: ignore[assignment]
        empty = torch.zeros if x.cu_seqlens is not None else torch.empty
        self.dq, self.dk = (
            empty((self.blocks, self.B, T, heads, self.K), device=self.q.device,
                  dtype=t.dtype if self.blocks == 1 else x.dtype)
            for t, T, heads in ((self.q, self.T, self.H), (self.k, self.S, self.G))
        )  # fmt: skip
        self.dz = empty((self.blocks, self.B, self.H, self.T), device=self.q.device, dtype=x.dtype)
        self.dv = new_heads(self.v, self.G, self.V)
        if x.cu_seqlens is not None:
            self.dv.zero_()
        self.query_shares = self.key_shares = None
        if x.log_decay is not None:
            shape = self.blocks, self.B, self.H, self.T
            self.query_shares = empty(shape, device=self.q.device, dtype=x.dtype)
            shape = self.blocks, self.B, self.G, self.T
            self.key_shares = empty(shape, device=self.q.device, dtype=x.dtype)

    def run(self) -> AttentionInputs:
        x, spec = self.x, self.spec
        state = x.numerator is not None
        dS, dZ = self.new_state_gradients()
        before = after = None
        if self.direct:
            past = x.numerator, x.denominator
            self.query_gradients(("state" if state else "none", *past))
            source = "none" if self.after[0] is None else "state"
            self.key_gradients((source, *self.after), (dS if state else None, dZ))
            if dZ is not None:
                dZ = dZ.sum(2)
        else:
            if spec.is_causal:
                before = self.key_sums((None, None))
                self.query_gradients(("spans", before.sums, before.weights))
            else:
                self.query_gradients(("state", self.y.final_numerator, self.y.final_denominator))
            dZ = None if dZ is None else dZ.new_empty(dZ.shape[0], dZ.shape[1], dZ.shape[3])
            totals = None if before is None else before.totals
            after = self.query_sums(totals, (dS, dZ))
            if spec.is_causal:
                self.key_gradients(("spans", after.sums, after.weights), (None, None))
            else:
                self.key_gradients(("state", dS, dZ), (None, None), partial=False)
        logs = None
        if x.log_decay is not None:
            logs = self.decay_gradient(before, after).to(x.log_decay.dtype)
        return AttentionInputs(
            self.whole(self.dq, self.q), self.whole(self.dk, self.k), self.dv,
            numerator=dS if state else None,
            denominator=dZ if state and spec.normalize else _zeros(x.denominator),
            log_decay=logs,
        )  # fmt: skip

    def new_state_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Empty gradients of the state before all tokens; each block of values has its vectors."""
        N, G, F, dtype = self.N, self.G, self.size.F, self.x.dtype
        weights = self.q.new_empty((N, G, self.blocks, F), dtype=dtype)
        return (
            self.q.new_empty((N, G, F, self.V), dtype=dtype),
            weights if self.spec.normalize else None,
        )

    def whole(self, parts: Tensor, like: Tensor) -> Tensor:
        """The sum of parts ``[parts, B, T, heads, K]``, in the memory layout of `new_heads`."""
        if len(parts) == 1:
            return parts[0].transpose(1, 2)
        return new_heads(like, *parts.shape[3:]).copy_(parts.sum(0).transpose(1, 2))

    def query_sums(
        self, totals: Tensor | None, before: tuple[Tensor | None, Tensor | None]
    ) -> Sums:
        """The gradients of the sums after each span of queries, and before all of them."""
        spans, x = self.queries, self.x
        sums, weights = self.new_sums(spans, self.blocks)
        self.launch(
            "query_sums", spans.number * self.G * self.blocks,
            self.q, self.dout, self.y.denominators, self.dz, x.log_decay, self.mask,
            sums, weights, *spans.tables,
            self.T, spans.length, spans.splits, self.H, self.G,
            *self.q.stride()[:3], *self.dout.stride()[:3], *self.decay_strides, self.dz[0].numel(),
        )  # fmt: skip
        after = self.after
        self.scan(spans, sums, totals, after[0], before[0], matrices=True, backwards=True)
        if self.spec.normalize:
            self.scan(
                spans,
                weights,
                totals,
                after[1],
                before[1],
                matrices=False,
                parts=self.blocks,
                backwards=True,
            )
        return Sums(sums, weights, totals)

    def query_gradients(self, source: tuple[str, Tensor | None, Tensor | None]) -> None:
        spans, x, y = self.queries, self.x, self.y
        self.launch(
            "query_gradients", spans.number * self.H * self.blocks,
            self.q, self.k, self.v, x.log_decay, self.mask, source[1], source[2],
            self.dout, y.out, y.denominators, self.dz, self.dq, self.query_shares, *spans.tables,
            self.T, spans.length, spans.splits, self.H, self.G,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
            *self.dout.stride()[:3], *y.out.stride()[:3], *self.decay_strides, self.dq[0].numel(),
            SOURCE=source[0], SHARES=x.log_decay is not None,
        )  # fmt: skip

    def key_gradients(
        self,
        source: tuple[str, Tensor | None, Tensor | None],
        before: tuple[Tensor | None, Tensor | None],
        partial: bool = True,
    ) -> None:
        spans, x, y = self.keys, self.x, self.y
        self.launch(
            "key_gradients", spans.number * self.G * self.blocks,
            self.q, self.k, self.v, x.log_decay, self.mask, source[1], source[2],
            self.dout, y.denominators, self.dz, self.dk, self.dv, self.key_shares, *before,
            *spans.tables,
            self.S, spans.length, spans.splits, self.H, self.G,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
            *self.dout.stride()[:3], *self.decay_strides,
            self.dk[0].numel(), self.dz[0].numel(), self.blocks if partial else 1,
            SOURCE=source[0], FINAL=before[0] is not None, SHARES=x.log_decay is not None,
        )  # fmt: skip

    def decay_gradient(self, before: Sums | None, after: Sums | None) -> Tensor:
        """The gradients of log decays, from the shares of queries and keys.

        The log decay of token l is in the weights of all pairs with query i ≥ l > key j. Over a
        span, ``Σ_{i ≥ l} (query shares - key shares)`` has all of these but those of later spans'
        queries, which are the product of the state after the span and its gradient.
        """
        x, spans = self.x, self.queries
        assert self.query_shares is not None
        assert self.key_shares is not None
        queries = self.query_shares.double().sum(0).unflatten(1, (self.G, -1)).sum(2)
        found = (queries - self.key_shares.double().sum(0)).flip(-1).cumsum(-1).flip(-1)
        found = torch.nn.functional.pad(found, (0, 1))  # [B, G, T + 1]
        last = torch.zeros((self.N, self.G), dtype=torch.float64, device=found.device)
        if self.after[0] is not None and self.after[1] is not None:
            last += (self.y.final_numerator * self.after[0]).double().sum((-1, -2))
            if self.spec.normalize:
                last += (self.y.final_denominator * self.after[1]).double().sum(-1)
        token = torch.arange(self.T, device=found.device)
        if spans.offsets is None or spans.firsts is None or spans.begins is None:
            span = token // spans.length
            later = last.view(self.B, 1, self.G).repeat(1, spans.splits, 1)
            if before is not None and after is not None:
                inner = self.products(before, after).view(self.B, spans.splits, self.G)
                later[:, :-1] = inner[:, 1:]
            ends = ((span + 1) * spans.length).clamp(max=self.T)
            found = found[..., :-1] - found[..., ends] + later[:, span].transpose(1, 2)
        else:
            assert before is not None
            assert after is not None
            offsets, firsts = spans.offsets.long(), spans.firsts.long()
            n = torch.searchsorted(offsets[1:], token, right=True).clamp(max=self.N - 1)
            span = (firsts[n] + (token - offsets[n]) // spans.length).clamp(max=spans.number - 1)
            ends = torch.minimum(spans.begins[span] + spans.length, offsets[n + 1])
            inner = self.products(before, after)
            following = torch.nn.functional.pad(inner[1:], (0, 0, 0, 1))
            later = torch.where((span + 1 == firsts[n + 1])[:, None], last[n], following[span])
            found = found[..., :-1] - found[..., ends] + later.T
            found = found.masked_fill(token >= offsets[-1], 0)
        if x.key_mask is not None:
            found = found.masked_fill(~x.key_mask[:, None], 0)
        return found

    def products(self, before: Sums, after: Sums) -> Tensor:
        """For each span, the product of the state before it and the gradient after the one before.

        ``[spans, G]`` in fp64; nothing for first spans.
        """
        found = torch.zeros(before.sums.shape[:2], dtype=torch.float64, device=before.sums.device)
        products = before.sums[1:] * after.sums[:-1]  # no matrix product, which could be in tf32
        found[1:] = products.sum((-1, -2), dtype=torch.float64)
        if self.spec.normalize:
            weights = before.weights[1:, :, 0]
            if self.size.order == 2:
                weights = weights * self.moments_weights(weights).view(-1)
            found[1:] += (weights * after.weights[:-1, :, 0]).sum(-1, dtype=torch.float64)
        return found

    def moments_weights(self, like: Tensor) -> Tensor:
        """What each number of `weights.py`'s sums of order 2 counts in a denominator."""
        size, factor = self.size, like.new_zeros(self.size.tile, self.size.width)
        row = size.single % size.tile
        factor[row : row + size.K] = 0.5 * size.scale**2
        factor[row + size.K] = size.scale
        factor[row + size.K + 1, 0] = float(size.constant)
        return factor
