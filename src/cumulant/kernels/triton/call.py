"""The kernels' arguments of a call of linear or Taylor attention, and how its tokens are split."""

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
    sequence_count,
)
from . import device

MOST_COLUMNS = 256  # of values, and of elementwise features
ONE = {"V": 1, "BV": 1, "BLOCKS": 1}  # column of vectors


class Spans(NamedTuple):
    """How the tokens of sequences are split."""

    number: int
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


class Sums(NamedTuple):
    """What a scan leaves: matrices and vectors of each span, and the spans' log decays."""

    sums: Tensor
    weights: Tensor
    totals: Tensor | None


class Call:
    """The kernels' arguments of one call."""

    def __init__(self, x: AttentionInputs, spec: AttentionSpec):
        from . import gradients, outputs, step, sums
        from .form import Form

        self.kernels = {**vars(sums), **vars(outputs), **vars(gradients), **vars(step)}
        (self.B, self.H, self.T, K), (self.G, self.S), V = (
            x.query.shape, x.key.shape[1:3], x.value.shape[-1]
        )  # fmt: skip
        S, z = (None if t is None else t.contiguous() for t in (x.numerator, x.denominator))
        x = x._replace(numerator=S, denominator=z)
        self.x, self.spec, self.K, self.V = x, spec, K, V
        self.N = sequence_count(self.B, x.cu_seqlens)
        q, k, v = (device.with_rows(t) for t in (x.query, x.key, x.value))
        self.q, self.k, self.v = q, k, v
        constants = form_constants(K, V, spec, device.dot_type(x.query, x.key, x.value), x.dtype)
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
        matrices = self.q.new_empty((spans.number, self.G, slots, self.V), dtype=dtype)
        weights = size.tile * size.width if size.order == 2 else slots
        shape = (spans.number, self.G, parts, weights) if self.spec.normalize else (0,)
        return matrices, self.q.new_empty(shape, dtype=dtype)

    def scan(
        self, spans: Spans, sums: Tensor, totals: Tensor | None, before: Tensor | None,
        after: Tensor | None, *, matrices: bool, parts: int = 1, backwards: bool = False,
    ) -> None:  # fmt: skip
        shared = sums, totals, spans.firsts, before, after, spans.splits, self.G, parts
        options: dict[str, int] = {"HAS_BEFORE": before is not None, "HAS_AFTER": after is not None}
        options["BACKWARDS"] = backwards
        programs, size = self.N * self.G, self.size
        if not matrices and size.order == 2:
            self.launch("scan_moments", programs, *shared, **options)
        else:
            options |= {"V": self.V, "BV": size.block, "BLOCKS": size.blocks} if matrices else ONE
            programs *= size.tiles * options["BLOCKS"]
            self.launch("scan_spans", programs, *shared, **options)

    def key_sums(self, final: tuple[Tensor | None, Tensor | None]) -> Sums:
        """The sums before each span of keys, which also gives the state after them all."""
        spans, x = self.keys, self.x
        (sums, weights), totals = self.new_sums(spans), None
        if x.log_decay is not None:
            totals = self.q.new_empty((spans.number, self.G), dtype=torch.float64)
        self.launch(
            "key_sums", spans.number * self.G * self.blocks,
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
            "outputs", spans.number * self.H * self.blocks,
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
            GROUP=self.H // self.G, BV=device.power_of_two(self.V, MOST_COLUMNS),
        )  # fmt: skip


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
    weights: int
    single: int
    block: int
    blocks: int
    sums: torch.dtype
    tiny: float
    dot: str
    flushes: bool = device.FLUSHES
    masked: bool = False
    packed: bool = False
    decays: bool = False


@lru_cache(maxsize=1024)
def form_constants(K: int, V: int, spec: AttentionSpec, dot: str, dtype: torch.dtype) -> Constants:
    """The constants of a call's kernels."""
    width = device.power_of_two(K)
    if spec.order:
        single = (K // 2 + 1) * K if spec.order == 2 else 0
        parts, tile = (
            1,
            device.power_of_two(single + K + 2),
        )  # with a 1, and a slot for the number of keys
        if single % tile + K + 2 > tile:
            single = -(-single // tile) * tile
        slots = single + K + 2
    else:
        single, slots, parts, tile = 0, K, -(-K // width), width
    block, tiles = device.power_of_two(V), -(-slots // tile)
    return Constants(
        K, V, feature_count(K, spec.order, spec.constant_term), spec.order, spec.constant_term,
        spec.activation, spec.scale, spec.normalize, spec.is_causal, int(spec.chunk), width, parts,
        tile, tiles, 2 if spec.order == 2 else tiles, single, block, max(1, -(-V // block)), dtype,
        torch.finfo(dtype).tiny, dot,
    )  # fmt: skip
