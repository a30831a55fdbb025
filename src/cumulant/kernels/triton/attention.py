"""Linear and Taylor attention by Triton kernels.

The tokens of each sequence are split into spans, if there are fewer sequences and heads than a GPU
has room for. Sums over each span, and then those before each span, come first. With one span a
sequence, one kernel reads and writes everything once. See docs/gpu.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import (
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    feature_count,
    new_heads,
    sequence_count,
)
from . import device

CHUNK = 64
SPAN = 512  # the fewest tokens in a span
MOST_COLUMNS = 256  # of values, and of elementwise features
MOST_TAYLOR = 32  # numbers in a vector whose Taylor features fit the registers


def obstacle(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """Why these kernels cannot run the call; empty if they can."""
    K, V = inputs.query.shape[-1], inputs.value.shape[-1]
    if elsewhere := device.obstacle(inputs.query):
        return elsewhere
    if spec.order > 2:
        return f"its kernels go up to order 2, and this is order {spec.order}"
    most = MOST_TAYLOR if spec.order else MOST_COLUMNS
    if not (0 < K <= most and V <= MOST_COLUMNS):
        return f"its kernels take K up to {most} and V up to {MOST_COLUMNS}, not K = {K}, V = {V}"
    return ""


def slower(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """Why another implementation is faster for the call; empty if none is."""
    return device.slower(inputs.query)


def prepared(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionSpec:
    """The options with chunk and span; calls that are not causal return sums for the gradients."""
    return spec._replace(
        chunk=CHUNK, span=SPAN, returns_state=spec.returns_state or not spec.is_causal
    )


def describe(inputs: AttentionInputs, spec: AttentionSpec) -> str:
    """How the kernels would compute the call, for `explain`."""
    features = feature_count(inputs.query.shape[-1], spec.order, spec.constant_term)
    return f"chunks of {spec.chunk} tokens, {features} features"


ONE = {"V": 1, "BV": 1, "BLOCKS": 1}  # column


class Spans(NamedTuple):
    """How the tokens of sequences are split."""

    count: int  # of spans
    length: int
    splits: int  # spans of each row of a batch
    rows: Tensor | None = None  # of each span, its packed sequence
    begins: Tensor | None = None  # and its first token
    firsts: Tensor | None = None  # [N + 1], the first span of each packed sequence
    offsets: Tensor | None = None  # [N + 1], as in the call

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.rows, self.begins, self.offsets


def split_tokens(T: int, programs: int, spec: AttentionSpec, x: AttentionInputs) -> Spans:
    """Spans of T tokens. programs: how many there are for each span of every sequence."""
    wanted = device.wanted_programs(x.query)
    splits = max(1, min(-(-T // spec.span), -(-wanted // max(programs, 1))))
    length = max(1, -(-T // (splits * spec.chunk))) * spec.chunk
    if x.cu_seqlens is None:
        splits = max(1, -(-T // length))
        return Spans(x.query.shape[0] * splits, length, splits)
    offsets = x.cu_seqlens.long()
    N = offsets.shape[0] - 1
    pieces = (offsets.diff() + length - 1) // length
    firsts = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    span = torch.arange(-(-T // length) + N, device=offsets.device)
    rows = torch.searchsorted(firsts[1:], span, right=True).clamp_(max=N - 1)
    begins = offsets[rows] + (span - firsts[rows]) * length
    tables = (x.to(torch.int32) for x in (rows, begins, firsts, offsets))
    return Spans(len(span), length, 0, *tables)


class Call:
    """The kernels' arguments of one call."""

    def __init__(self, x: AttentionInputs, spec: AttentionSpec):
        from . import gradients, outputs, step, sums
        from .form import Form

        self.kernels = {**vars(sums), **vars(outputs), **vars(gradients), **vars(step)}
        (self.B, self.H, self.T, K), (self.G, self.S), V = (
            x.query.shape, x.key.shape[1:3], x.value.shape[-1]
        )  # fmt: skip
        self.x, self.spec, self.K, self.V = x, spec, K, V
        self.N = sequence_count(self.B, x.cu_seqlens)
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (x.query, x.key, x.value))
        self.q, self.k, self.v = q, k, v
        constants = form_constants(K, V, spec, device.dot_types(x.query, x.key, x.value), x.dtype)
        self.form = Form(*device.constants(*constants._replace(
            masked=x.key_mask is not None, packed=x.cu_seqlens is not None,
            decays=x.log_decay is not None,
        )))  # fmt: skip
        self.size = constants
        self.blocks = constants.blocks
        self.mask = None if x.key_mask is None else x.key_mask.contiguous().view(torch.uint8)
        logs = x.log_decay
        self.decay_strides = (0, 0, 0) if logs is None else logs.stride()
        self.queries = split_tokens(self.T, self.B * self.H * self.blocks, spec, x)
        self.keys = self.queries
        if self.S != self.T:
            self.keys = split_tokens(self.S, self.B * self.G * self.blocks, spec, x)
        # one span a sequence: its kernel starts from the state and ends with one
        self.direct = spec.is_causal and self.queries.splits == 1 and self.T > 0

    def launch(self, kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
        """Run a kernel, if it has any programs."""
        if programs:
            function = self.kernels[kernel]
            device.launch(function, programs, self.x.query, *arguments, form=self.form, **constants)

    def new_sums(self, spans: Spans, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Empty sums of every span: matrices, and `parts` vectors."""
        size, dtype = self.size, self.x.dtype
        slots = size.tile * size.tiles
        matrices = self.q.new_empty((spans.count, self.G, slots, self.V), dtype=dtype)
        weights = size.tile * size.width if size.order == 2 else slots
        shape = (spans.count, self.G, parts, weights) if self.spec.normalize else (0,)
        return matrices, self.q.new_empty(shape, dtype=dtype)

    def scan(
        self, spans: Spans, sums: Tensor, totals: Tensor | None, before: Tensor | None,
        after: Tensor | None, *, matrices: bool, parts: int = 1, backwards: bool = False,
    ) -> None:  # fmt: skip
        shared = (
            sums, totals, spans.firsts, before, after, spans.splits, spans.count, self.G, parts
        )  # fmt: skip
        options = {"HAS_BEFORE": before is not None, "HAS_AFTER": after is not None}
        options["BACKWARDS"] = backwards
        programs, size = self.N * self.G, self.size
        if not matrices and size.order == 2:
            self.launch("scan_moments", programs, *shared, **options)
        else:
            options |= {"V": self.V, "BV": size.block, "BLOCKS": size.blocks} if matrices else ONE
            programs *= size.tiles * options["BLOCKS"]
            self.launch("scan_spans", programs, *shared, **options)

    def key_sums(self, final: tuple[Tensor | None, Tensor | None]) -> "Sums":
        """The sums before each span of keys, which also gives the state after them all."""
        spans, x = self.keys, self.x
        (sums, weights), totals = self.new_sums(spans), None
        if x.log_decay is not None:
            totals = self.q.new_empty((spans.count, self.G), dtype=torch.float64)
        self.launch(
            "key_sums", spans.count * self.G * self.blocks,
            self.k, self.v, x.log_decay, self.mask, sums, weights, totals, *spans.tables,
            self.S, spans.length, spans.splits, self.G,
            *self.k.stride()[:3], *self.v.stride()[:3], *self.decay_strides,
        )  # fmt: skip
        self.scan(spans, sums, totals, x.numerator, final[0], matrices=True)
        if self.spec.normalize:
            self.scan(spans, weights, totals, x.denominator, final[1], matrices=False)
        return Sums(sums, weights, totals)

    def read(self, source: tuple[str, Tensor | None, Tensor | None], y: AttentionOutputs,
             final: tuple[Tensor | None, Tensor | None]) -> None:  # fmt: skip
        """The outputs and denominators, from sums before each span or from a state."""
        spans, x = self.queries, self.x
        self.launch(
            "outputs", spans.count * self.H * self.blocks,
            self.q, self.k, self.v, x.log_decay, self.mask, source[1], source[2],
            y.out, y.denominators, *final, *spans.tables,
            self.T, spans.length, spans.splits, self.H, self.G,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3],
            *y.out.stride()[:3], *self.decay_strides,
            SOURCE=source[0], FINAL=final[0] is not None,
        )  # fmt: skip


    def step(self, y: AttentionOutputs) -> None:
        """One token onto a state."""
        x = self.x
        self.launch(
            "step", self.B * self.G,
            self.q, self.k, self.v, x.log_decay, self.mask, x.numerator, x.denominator,
            y.out, y.denominators, y.final_numerator, y.final_denominator, self.G,
            *self.q.stride()[:2], *self.k.stride()[:2], *self.v.stride()[:2], *y.out.stride()[:2],
            *self.decay_strides[:2],
            GROUP=self.H // self.G, BV=_power(self.V, MOST_COLUMNS),
        )  # fmt: skip


class Sums(NamedTuple):
    """What a scan leaves: matrices and vectors of each span, and the spans' log decays."""

    sums: Tensor
    weights: Tensor
    totals: Tensor | None


class Constants(NamedTuple):
    """The fields of `Form`, by their Python values."""

    K: int
    V: int
    F: int
    order: int
    constant: bool
    activation: str
    scale: float
    normalize: bool
    causal: bool
    chunk: int
    width: int
    parts: int
    tile: int
    tiles: int
    single: int
    block: int
    blocks: int
    sums: torch.dtype
    tiny: float
    dot: str
    exact: str
    masked: bool = False
    packed: bool = False
    decays: bool = False


def _power(n: int, most: int = 64) -> int:
    """The power of two that holds n, from 16 to `most`."""
    return min(max(16, 1 << (n - 1).bit_length()), most)


@lru_cache(maxsize=1024)
def form_constants(
    K: int, V: int, spec: AttentionSpec, dots: tuple[str, str], dtype: torch.dtype
) -> Constants:
    """The constants of a call's kernels."""
    width = _power(K)
    if spec.order:
        single = (K // 2 + 1) * K if spec.order == 2 else 0
        parts, tile = 1, _power(single + K + 2)  # with a 1, and a slot for the number of keys
        if single % tile + K + 2 > tile:
            single = -(-single // tile) * tile
        slots = single + K + 2
    else:
        single, slots, parts, tile = 0, K, -(-K // width), width
    block = _power(V)
    return Constants(
        K, V, feature_count(K, spec.order, spec.constant_term), spec.order, spec.constant_term,
        spec.activation, spec.scale, spec.normalize, spec.is_causal, int(spec.chunk), width, parts, tile,
        -(-slots // tile), single, block, max(1, -(-V // block)), dtype, torch.finfo(dtype).tiny, *dots,
    )  # fmt: skip


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
    """The outputs by the Triton kernels."""
    call, y = Call(inputs, spec), spec.new_outputs(inputs)
    if inputs.cu_seqlens is not None:  # tokens after the last sequence
        y.out.zero_()
        y.denominators.zero_()
    final = (y.final_numerator, y.final_denominator) if spec.returns_state else (None, None)
    if call.direct and call.T == 1 and spec.returns_state and inputs.numerator is not None:
        call.step(y)
    elif call.direct:
        source = "none" if inputs.numerator is None else "state"
        call.read((source, inputs.numerator, inputs.denominator), y, final)
    else:
        before = call.key_sums(final)
        if spec.is_causal:
            call.read(("spans", before.sums, before.weights), y, (None, None))
        else:
            call.read(("state", *final), y, (None, None))
    return y


def backward(
    upstream: AttentionOutputs,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    spec: AttentionSpec,
) -> AttentionInputs:
    """The inputs' gradients by the Triton kernels."""
    return Gradients(upstream, inputs, outputs, spec).run()


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
        self.upstream, self.y = upstream, y
        self.dout = upstream.out if upstream.out.stride(-1) == 1 else upstream.out.contiguous()
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
        logs = None if x.log_decay is None else self.decay_gradient(before, after)
        return AttentionInputs(
            self.whole(self.dq, self.q), self.whole(self.dk, self.k), self.dv,
            numerator=dS if state else None,
            denominator=None if x.denominator is None else self.weights_gradient(dZ),
            log_decay=logs,
        )  # fmt: skip

    def weights_gradient(self, dZ: Tensor | None) -> Tensor | None:
        return torch.zeros_like(self.x.denominator) if dZ is None else dZ

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
        _, B, T, heads, K = parts.shape
        found = new_heads(like, heads, K)
        if len(parts) == 1:
            return found.copy_(parts[0].transpose(1, 2))
        return found.copy_(parts.sum(0).transpose(1, 2))

    def query_sums(
        self, totals: Tensor | None, before: tuple[Tensor | None, Tensor | None]
    ) -> Sums:
        """The gradients of the sums after each span of queries, and before all of them."""
        spans, x = self.queries, self.x
        sums, weights = self.new_sums(spans, self.blocks)
        self.launch(
            "query_sums", spans.count * self.G * self.blocks,
            self.q, self.dout, self.y.denominators, self.dz, x.log_decay, self.mask,
            sums, weights, *spans.tables,
            self.T, spans.length, spans.splits, self.H, self.G,
            *self.q.stride()[:3], *self.dout.stride()[:3], *self.decay_strides, self.dz[0].numel(),
        )  # fmt: skip
        after = self.after
        self.scan(spans, sums, totals, after[0], before[0], matrices=True, backwards=True)
        if self.spec.normalize:
            self.scan(
                spans, weights, totals, after[1], before[1], matrices=False, parts=self.blocks, backwards=True
            )
        return Sums(sums, weights, totals)

    def query_gradients(self, source: tuple[str, Tensor | None, Tensor | None]) -> None:
        spans, x, y = self.queries, self.x, self.y
        self.launch(
            "query_gradients", spans.count * self.H * self.blocks,
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
            "key_gradients", spans.count * self.G * self.blocks,
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
        x, spans, logs = self.x, self.queries, self.x.log_decay
        queries = self.query_shares.double().sum(0).unflatten(1, (self.G, -1)).sum(2)
        found = (queries - self.key_shares.double().sum(0)).flip(-1).cumsum(-1).flip(-1)
        found = torch.nn.functional.pad(found, (0, 1))  # [B, G, T + 1]
        last = torch.zeros((self.N, self.G), dtype=torch.float64, device=found.device)
        if self.after[0] is not None:
            last += (self.y.final_numerator * self.after[0]).double().sum((-1, -2))
            if self.spec.normalize:
                last += (self.y.final_denominator * self.after[1]).double().sum(-1)
        token = torch.arange(self.T, device=found.device)
        if x.cu_seqlens is None:
            span = token // spans.length
            later = last.view(self.B, 1, self.G).repeat(1, spans.splits, 1)
            if before is not None and after is not None:
                inner = self.products(before, after).view(self.B, spans.splits, self.G)
                later[:, :-1] = inner[:, 1:]
            ends = ((span + 1) * spans.length).clamp(max=self.T)
            found = found[..., :-1] - found[..., ends] + later[:, span].transpose(1, 2)
        else:
            offsets, firsts = spans.offsets.long(), spans.firsts.long()
            n = torch.searchsorted(offsets[1:], token, right=True).clamp(max=self.N - 1)
            span = (firsts[n] + (token - offsets[n]) // spans.length).clamp(max=spans.count - 1)
            ends = torch.minimum(spans.begins[span] + spans.length, offsets[n + 1])
            inner = self.products(before, after)
            following = torch.nn.functional.pad(inner[1:], (0, 0, 0, 1))
            later = torch.where((span + 1 == firsts[n + 1])[:, None], last[n], following[span])
            found = found[..., :-1] - found[..., ends] + later.T
            found = found.masked_fill(token >= offsets[-1], 0)
        if x.key_mask is not None:
            found = found.masked_fill(~x.key_mask[:, None], 0)
        return found.to(logs.dtype)

    def products(self, before: Sums, after: Sums) -> Tensor:
        """For each span, the product of the state before it and the gradient after the one before.

        ``[spans, G]`` in fp64; nothing for first spans.
        """
        found = torch.zeros(before.sums.shape[:2], dtype=torch.float64, device=before.sums.device)
        found[1:] = torch.einsum("ugfv,ugfv->ug", before.sums[1:], after.sums[:-1])
        if self.spec.normalize:
            weights = before.weights[1:, :, 0]
            if self.size.order == 2:
                weights = weights * self.moments_weights(weights).view(-1)
            found[1:] += torch.einsum("ugf,ugf->ug", weights, after.weights[:-1, :, 0])
        return found

    def moments_weights(self, like: Tensor) -> Tensor:
        """What each number of `weights.py`'s sums of order 2 counts in a denominator."""
        size, factor = self.size, like.new_zeros(self.size.tile, self.size.width)
        row = size.single % size.tile
        factor[row : row + size.K] = 0.5 * size.scale**2
        factor[row + size.K] = size.scale
        factor[row + size.K + 1, 0] = float(size.constant)
        return factor
