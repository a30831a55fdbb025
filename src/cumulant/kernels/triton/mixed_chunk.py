"""Mixed chunk attention by Triton kernels.

A first kernel adds up the linear keys and values of each group, and a second adds these sums over
the groups before. Then all groups run at once. No step waits for the device: where tokens are
masked or packed, an index of them is built there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..spec import (
    MixedChunkInputs,
    MixedChunkOutputs,
    MixedChunkSpec,
    accumulation_dtype,
    mixed_chunk_gradients,
    sequence_count,
)
from . import device

CHUNK = 64
PART = 64  # numbers of a vector at once
MOST_KEYS = 128  # numbers in a key
SCANNED = 1024  # numbers of a sum that one program scans


def obstacle(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> str:
    """Why these kernels cannot run the call; empty if they can."""
    if elsewhere := device.obstacle(inputs.value):
        return elsewhere
    K, L = inputs.quad_key.shape[-1], inputs.lin_key.shape[-1]
    if not (0 < K <= MOST_KEYS and 0 < L <= MOST_KEYS):
        return f"its kernels take keys of up to {MOST_KEYS} numbers, not {K} and {L}"
    return "its kernels have no dropout" if spec.dropout_p else ""


def slower(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> str:
    """Why another implementation is faster for the call; empty if none is."""
    return device.slower(inputs.value)


def prepared(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkSpec:
    """The options; these kernels add none."""
    return spec


def describe(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> str:
    """How the kernels would compute the call, for `explain`."""
    return f"groups of {spec.group_size} tokens, all at once"


def mixed_form(
    x: MixedChunkInputs, spec: MixedChunkSpec, hip: bool | None = None
) -> dict[str, Any]:
    """The constants of a call's kernels, by the names of `MixedForm`."""
    K, L, V = (t.shape[-1] for t in (x.quad_key, x.lin_key, x.value))
    blocks, chunk = (
        [device.power_of_two(n, PART) for n in (K, L, V)],
        device.power_of_two(spec.group_size, CHUNK),
    )
    parts = [-(-n // block) for n, block in zip((K, L, V), blocks)]
    dtype = accumulation_dtype(x.value)
    dot = device.dot_type(x.value) if hip is None else device.dot_type(x.value, hip=hip)
    return {
        "K": K, "L": L, "V": V, "BK": blocks[0], "BL": blocks[1], "BV": blocks[2],
        "K_PARTS": parts[0], "L_PARTS": parts[1], "V_PARTS": parts[2], "SIZE": spec.group_size,
        "C": chunk, "CHUNKS": -(-spec.group_size // chunk),
        "GROUP": x.quad_query.shape[1] // x.value.shape[1], "ACTIVATION": spec.activation,
        "CAUSAL": spec.is_causal, "SUMMED": spec.is_causal or spec.reduce_groups,
        "BIASES": 0 if x.bias is None else x.bias.shape[0], "SUM": dtype, "DOT": dot,
        "FLUSHES": device.FLUSHES if hip is None else not hip, "INDEXED": not x.covers_tokens,
        "STATE": x.position is not None,
    }  # fmt: skip


class _Places(NamedTuple):
    """Where the tokens of groups are; what is None follows from the rows alone."""

    order: Tensor | None  # [B·T], tokens of all sequences in order, by their place in the batch
    rows: Tensor | None  # [groups], the sequence of each; -1 for groups that do not exist
    numbers: Tensor | None  # [groups], each group's number in its sequence
    bases: Tensor | None  # [N + 1], where each sequence's tokens begin in the index
    fills: Tensor | None  # [N], tokens in a state's open group
    firsts: Tensor | None  # [N + 1], each sequence's first group


def _find_places(x: MixedChunkInputs, g: int) -> tuple[_Places, int, int]:
    """The tables, how many groups there are at most, and at most in a sequence."""
    (B, _, T, _), N = x.value.shape, sequence_count(x.value.shape[0], x.cu_seqlens)
    fills = None if x.position is None else (x.position % g).long()
    most = -(-T // g) + (fills is not None)
    if x.covers_tokens:
        return _Places(None, None, None, None, fills, None), B * most, most
    device = x.value.device
    place = torch.arange(B * T, device=device)
    if x.cu_seqlens is None:
        edges, groups = torch.arange(B + 1, device=device) * T, B * most
    else:
        edges = x.cu_seqlens.long()
        groups = T // g + N * (1 + (fills is not None))
    seen = place < edges[-1]
    if x.key_mask is not None:
        seen = seen & x.key_mask.flatten()
    count = pad(seen.cumsum(0), (1, 0))
    # what is in no sequence goes to one more place at the end
    index = place.new_zeros(B * T + 1).scatter_(0, torch.where(seen, count[1:] - 1, B * T), place)
    bases = count[edges]
    slots = bases.diff() + (0 if fills is None else fills)
    firsts = pad(((slots + g - 1) // g).cumsum(0), (1, 0))
    u = torch.arange(groups, device=device)
    rows = torch.searchsorted(firsts[1:], u, right=True)
    numbers = u - firsts[rows.clamp(max=N - 1)]
    return _Places(index, rows.where(rows < N, -1), numbers, bases, fills, firsts), groups, most


class _Call:
    """The kernels' arguments of one call."""

    def __init__(self, x: MixedChunkInputs, spec: MixedChunkSpec):
        from . import groups, mixed_gradients, mixed_outputs
        from .mixed_form import MixedForm

        self.kernels = {**vars(groups), **vars(mixed_outputs), **vars(mixed_gradients)}
        self.x, self.spec, self.sizes = x, spec, mixed_form(x, spec)
        self.form = MixedForm(*device.constants(*self.sizes.values()))
        (self.B, self.G, self.T, self.V), self.H = x.value.shape, x.quad_query.shape[1]
        self.N = sequence_count(self.B, x.cu_seqlens)
        self.tokens = [device.with_rows(t) for t in x.tokens]
        self.past = [None if t is None else t.contiguous() for t in x.sums]
        self.bias = None if x.bias is None else x.bias.contiguous()
        self.places, self.groups, self.most = _find_places(x, spec.group_size)
        self.dtype = accumulation_dtype(x.value)

    def launch(self, kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
        """Run a kernel, if it has any programs."""
        if programs:
            function = self.kernels[kernel]
            like = self.tokens[0]
            device.launch(function, programs, like, *arguments, form=self.form, **constants)

    @property
    def of_groups(self) -> tuple[Any, ...]:
        """The arguments that find the tokens of groups."""
        return *self.places[:5], self.T, self.most, self.H, self.G

    @property
    def chunks(self) -> int:
        """Of all groups."""
        return self.groups * int(self.sizes["CHUNKS"])

    def sums_of_groups(self, keys: Tensor, values: Tensor, *, queries: bool) -> Tensor:
        """The sums of each group alone, ``[groups, G, L, V]``."""
        L, parts = self.sizes["L"], self.sizes["L_PARTS"] * self.sizes["V_PARTS"]
        found = keys.new_empty((self.groups, self.G, L, self.V), dtype=self.dtype)
        self.launch(
            "group_sums", self.groups * self.G * parts, keys, values, self.past[2], self.past[3],
            found, *self.of_groups, *keys.stride()[:3], *values.stride()[:3], QUERIES=queries,
        )  # fmt: skip
        return found

    def scan(self, sums: Tensor, before: Tensor | None, *, backwards: bool) -> Tensor:
        """The sums over all groups ``[N, G, L, V]``; causal ones leave those before each group."""
        size = sums.shape[2] * sums.shape[3]
        after = sums.new_empty((self.N, *sums.shape[1:]))
        self.launch(
            "scan_groups", self.N * self.G * -(-size // SCANNED), sums, self.places.firsts, before,
            after, self.most, self.G, size, HAS_BEFORE=before is not None,
            KEEP=self.spec.is_causal, BACKWARDS=backwards, BLOCK=SCANNED,
        )  # fmt: skip
        return after

    def sums_before(self) -> tuple[Tensor | None, Tensor | None]:
        """What the linear queries of groups read, and the sums over all groups."""
        if not self.sizes["SUMMED"]:
            return None, None
        sums = self.sums_of_groups(self.tokens[3], self.tokens[4], queries=False)
        after = self.scan(sums, self.past[0], backwards=False)
        return (sums if self.spec.is_causal else after), after

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments that most kernels begin with."""
        return *self.tokens, *self.past[1:], self.bias

    @property
    def strides(self) -> list[int]:
        return [s for t in self.tokens for s in t.stride()[:3]]

    def keep_open_group(self, y: MixedChunkOutputs) -> None:
        """The tokens of the open groups after the call."""
        p = self.places
        tokens = (self.tokens[1], self.tokens[3], self.tokens[4])
        finals = (y.final_quad_key, y.final_lin_key, y.final_value)
        for x, past, final, D in zip(tokens, self.past[1:], finals, "KLV", strict=True):
            parts = self.sizes[f"{D}_PARTS"]
            self.launch(
                "open_group", self.N * self.G * self.sizes["CHUNKS"] * parts, x, past, final,
                p.order, p.bases, p.fills, self.T, self.G, *x.stride()[:3],
                D=self.sizes[D], BD=self.sizes[f"B{D}"], PARTS=parts,
            )  # fmt: skip


def forward(inputs: MixedChunkInputs, spec: MixedChunkSpec) -> MixedChunkOutputs:
    """The outputs by the Triton kernels."""
    call, y = _Call(inputs, spec), spec.new_outputs(inputs)
    if not inputs.covers_tokens:
        y.out.zero_()
    sums, after = call.sums_before()
    call.launch(
        "mixed_outputs", call.chunks * call.H * call.sizes["V_PARTS"], *call.inputs, sums, y.out,
        *call.of_groups, *call.strides, *y.out.stride()[:3],
    )  # fmt: skip
    if spec.returns_state:
        call.keep_open_group(y)
        assert after is not None
        y = y._replace(final_numerator=after)
    return y


def backward(
    upstream: MixedChunkOutputs,
    inputs: MixedChunkInputs,
    outputs: MixedChunkOutputs,
    spec: MixedChunkSpec,
) -> MixedChunkInputs:
    """The inputs' gradients by the Triton kernels."""
    return _Gradients(upstream, inputs, spec).run()


class _Gradients(_Call):
    """The kernels' arguments of one backward call."""

    def __init__(self, upstream: MixedChunkOutputs, x: MixedChunkInputs, spec: MixedChunkSpec):
        super().__init__(x, spec)
        self.upstream, self.dout = upstream, device.with_rows(upstream.out)
        given = spec.new_gradients(x, None)  # type: ignore[arg-type]
        self.found, self.open = list(given.tokens), list(given.sums)
        if not x.covers_tokens:
            for t in self.found:
                t.zero_()
        for still_open in self.open[1:]:
            if still_open is not None:  # slots without a token
                still_open.zero_()
        after = upstream.state[1:]
        self.after: list[Tensor | None] = [None] * 3
        if any(t is not None for t in after):
            shapes = spec.state_shapes(x)[1:]
            self.after = [
                x.value.new_zeros(shape, dtype=self.dtype) if t is None else t.contiguous()
                for t, shape in zip(after, shapes, strict=True)
            ]

    def run(self) -> MixedChunkInputs:
        dS = upper = None
        sums, _ = self.sums_before()
        if self.sizes["SUMMED"]:
            after = self.upstream.final_numerator
            upper = self.sums_of_groups(self.tokens[2], self.dout, queries=True)
            dS = self.scan(upper, None if after is None else after.contiguous(), backwards=True)
            upper = upper if self.spec.is_causal else dS
        shared = *self.strides, *self.dout.stride()[:3]
        dq, dk, dr, ds, dv = self.found
        self.launch(
            "mixed_query_gradients", self.chunks * self.H, *self.inputs, sums, self.dout, dq, dr,
            *self.of_groups, *shared, *dq.stride()[:3], *dr.stride()[:3],
        )  # fmt: skip
        has_after = self.after[0] is not None
        self.launch(
            "mixed_key_gradients", self.chunks * self.G, *self.inputs, upper, self.dout,
            *self.after[:2], dk, ds, *self.open[1:3], *self.of_groups, *shared,
            *dk.stride()[:3], *ds.stride()[:3], AFTER=has_after,
        )  # fmt: skip
        self.launch(
            "mixed_value_gradients", self.chunks * self.G * self.sizes["V_PARTS"], *self.inputs,
            upper, self.dout, self.after[2], dv, self.open[3], *self.of_groups, *shared,
            *dv.stride()[:3], AFTER=has_after,
        )  # fmt: skip
        state = (None,) * 4 if self.x.numerator is None else (dS, *self.open[1:])
        return mixed_chunk_gradients(self.found, self.bias_gradient(shared), state)

    def bias_gradient(self, shared: tuple[int, ...]) -> Tensor | None:
        if self.bias is None:
            return None
        g, chunks = self.spec.group_size, self.sizes["CHUNKS"] ** 2 * self.H
        wanted = device.wanted_programs(self.tokens[0])
        splits = max(1, min(self.groups, -(-wanted // chunks)))
        parts = self.dout.new_empty((splits, self.H, g, g), dtype=self.dtype)
        self.launch(
            "bias_gradients", splits * chunks, *self.inputs, None, self.dout, parts,
            *self.of_groups, *shared, self.groups, splits,
        )  # fmt: skip
        over = (0, 1) if self.bias.shape[0] == 1 else 0
        found = parts.sum(over, keepdim=self.bias.shape[0] == 1)
        return found.view(self.bias.shape).to(self.bias.dtype)
