"""Programs: one token through a whole layer in one native call, for decoding.

For a single token, Python takes longer than the arithmetic. So modules write a program once, a list
of instructions on vectors, and it runs for every token. It works in fp32, without gradients.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..quantized import groups_of, row_bytes
from ..spec import feature_count
from .attention import ACTIVATIONS
from .library import (
    CHUNK,
    MAX_ORDER,
    TYPES,
    Attention,
    Instruction,
    Past,
    _pointer,
    call_library,
    instruction_set_number,
)
from .library import Program as Arguments

OPERATIONS = (  # in the order of Operation in src/abi.hpp
    *("norm", "matrix", "convolution", "shift"),
    *("rotary", "attend", "gate", "activate", "decay", "softmax"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("rmsnorm", "layernorm", "scalenorm")
ACTIVATED = ("swiglu", "gelu", "product")
DECAYS = ("fixed", "gated", "mamba2")


class Unsuitable(Exception):
    """Raised when a program cannot do what a module needs."""


class Vector(NamedTuple):
    """A vector of a token's numbers: its start in the token's row, and its size."""

    start: int
    size: int

    def split(self, *sizes: int) -> list[Vector]:
        """Consecutive vectors of these sizes."""
        starts = [self.start + sum(sizes[:i]) for i in range(len(sizes))]
        return [Vector(start, size) for start, size in zip(starts, sizes, strict=True)]


class Program:
    """Instructions for one token. `input` is its vector of `dim` numbers.

    Weights are in fp32, bf16 or fp16. dtype: of the states that are no sums.
    """

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self._width = self._widest = 0  # numbers of a row that are in use now, and at most
        self.input = self.vector(dim)
        self.states: list[tuple[int, ...]] = []  # the shape of each state, without the batch
        self.sums: set[int] = set()  # states in fp32
        self.windows: dict[int, int | None] = {}  # of states of keys, each before one of values
        self._instructions: list[Instruction] = []
        self._weights: list[Tensor] = []  # kept alive, because instructions have their addresses
        self._attention: list[Attention] = []
        self._rotates = False

    def vector(self, size: int) -> Vector:
        """A new vector, whose start is a multiple of 16 numbers."""
        start = self._width
        self._width += -(-size // 16) * 16
        return Vector(start, size)

    @contextmanager
    def reuse_vectors(self) -> Iterator[None]:
        """Let later vectors take the place of those that the block makes, which end with it."""
        start, widest = self._width, self._widest
        try:
            yield
        finally:
            self._widest, self._width = max(widest, self._widest, self._width), start

    def norm(
        self,
        x: Vector,
        kind: str,
        eps: float,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        heads: int = 1,
    ) -> Vector:
        """Normalise each head of x."""
        size = x.size // heads
        self._keep_weight(weight, (1,) if kind == "scalenorm" else (size,))
        self._keep_weight(bias, (size,))
        y = self.vector(x.size)
        self._add_instruction(
            "norm", kind=NORMS.index(kind), source=x, target=y, n=heads, k=size, weight=weight,
            bias=bias, scalar=eps, fourth=self._widening(2 * size, weight),
        )  # fmt: skip
        return y

    def matrix(
        self,
        x: Vector,
        weight: Tensor,
        bias: Tensor | None = None,
        to: Vector | None = None,
        add: bool = False,
    ) -> Vector:
        """``W x + b`` as a new vector, or written to the vector `to`, or added to it if `add`."""
        n, k = weight.shape
        y = self.vector(n) if to is None else to
        self._keep_weight(weight, (y.size, x.size))
        self._keep_weight(bias, (n,))
        self._add_instruction(
            "matrix", source=x, target=y, n=n, k=k, weight=weight, bias=bias, add=add
        )
        return y

    def quantized_matrix(
        self,
        x: Vector,
        codes: Tensor,
        scales: Tensor,
        bits: int,
        bias: Tensor | None = None,
        to: Vector | None = None,
        add: bool = False,
    ) -> Vector:
        """As `matrix`, for a matrix of 8 or 4 bits (`cumulant.kernels.quantized`)."""
        n = codes.shape[0]
        y = self.vector(n) if to is None else to
        self._keep_weight(codes, (y.size, row_bytes(x.size, bits)), torch.uint8)
        self._keep_weight(scales, (n, groups_of(x.size)), torch.float32)
        self._keep_weight(bias, (n,))
        self._add_instruction(
            "matrix", source=x, target=y, n=n, k=x.size, weight=codes, bias=bias, scales=scales,
            add=add, bits=bits,
        )  # fmt: skip
        return y

    def convolve(self, x: Vector, weight: Tensor) -> Vector:
        """``Σ_j weight[j] ⊙ x_{t-j}``; its state has the earlier inputs, ``[taps - 1, x.size]``."""
        taps = weight.shape[0]
        self._keep_weight(weight, (taps, x.size))
        y = self.vector(x.size)
        state = self._add_state(taps - 1, x.size)
        self._add_instruction(
            "convolution", source=x, target=y, n=taps, k=x.size, weight=weight, state=state,
            fourth=self._widening(taps * x.size, weight),
        )  # fmt: skip
        return y

    def shift(self, x: Vector) -> Vector:
        """Take the second half of the numbers from the token before; state ``[1, x.size // 2]``."""
        y, shifted = self.vector(x.size), x.size // 2
        self._add_instruction(
            "shift", source=x, target=y, n=x.size - shifted, k=shifted,
            state=self._add_state(1, shifted),
        )  # fmt: skip
        return y

    def rotate(self, x: Vector, dim: int, base: float) -> None:
        """Rotate the heads of x, each of `dim` numbers, in place, by rotary positions."""
        self._rotates = True
        self._add_instruction("rotary", target=x, n=x.size // dim, k=dim, scalar=base)

    def attend(
        self,
        query: Vector,
        key: Vector,
        value: Vector,
        heads: int,
        groups: int,
        *,
        order: int,
        constant_term: bool,
        activation: str,
        scale: float,
        normalize: bool,
        log_decay: Vector | None = None,
    ) -> Vector:
        """Linear or Taylor attention; log_decay: one for each key/value head.

        Its states are the numerator ``[G, F, V]`` and, if normalised, the denominator ``[G, F]``.
        """
        K, V = query.size // heads, value.size // groups
        features = math.comb(K + order, order) if order else K
        sizes = query.size == heads * K and key.size == groups * K and value.size == groups * V
        if log_decay is not None:
            sizes = sizes and log_decay.size == groups
        if not sizes or order > MAX_ORDER or activation not in ACTIVATIONS or features >= 2**31:
            raise Unsuitable
        F = feature_count(K, order, constant_term)
        state = self._add_state(groups, F, V)
        self.sums.add(state)
        if normalize:
            self.sums.add(self._add_state(groups, F))
        self._attention.append(
            Attention(
                H=heads, G=groups, T=1, S=1, K=K, V=V, F=F, chunk=CHUNK, span=1, order=order,
                constant_term=constant_term, activation=ACTIVATIONS.index(activation),
                normalize=normalize, is_causal=True, scale=scale,
            )
        )  # fmt: skip
        y = self.vector(heads * V)
        self._add_instruction(
            "attend", source=query, second=key, third=value, target=y, state=state,
            fourth=-1 if log_decay is None else log_decay,
        )  # fmt: skip
        self._instructions[-1].attention = ctypes.pointer(self._attention[-1])
        return y

    def attend_softmax(
        self, query: Vector, key: Vector, value: Vector, groups: int, dim: int, window: int | None
    ) -> Vector:
        """Softmax attention with heads of `dim` numbers to the last `window` tokens, or to all.

        Its states are the keys and the values before, ``[G, S, dim]`` each.
        """
        heads = query.size // dim
        if window is not None and window < 2:
            raise Unsuitable
        if heads * dim != query.size or key.size != groups * dim or value.size != key.size:
            raise Unsuitable
        sums, y, state = self.vector(2 * heads), self.vector(query.size), len(self.states)
        past, self.windows[state] = len(self.windows), window
        self.states += [(groups, -1, dim)] * 2
        self._add_instruction(
            "softmax", source=query, second=key, third=value, fourth=sums, target=y, state=state,
            n=heads, k=dim, groups=groups, past=past, scalar=dim**-0.5,
        )  # fmt: skip
        return y

    def decay(
        self,
        kind: str,
        x: Vector | None,
        weight: Tensor | None = None,
        factor: float = 1.0,
    ) -> Vector:
        """Log decays: ``weight`` ("fixed"), ``logsigmoid(x) factor`` ("gated"), or
        ``-exp(weight) softplus(x)`` ("mamba2").
        """
        if (weight is None) != (kind == "gated") or (x is None) != (kind == "fixed"):
            raise Unsuitable
        n = x.size if x is not None else weight.numel() if weight is not None else 0
        self._keep_weight(weight, (n,))
        y = self.vector(n)
        self._add_instruction(
            "decay", kind=DECAYS.index(kind), source=x or y, target=y, n=y.size, weight=weight,
            scalar=factor, fourth=self._widening(n, weight),
        )  # fmt: skip
        return y

    def gate(self, x: Vector, gates: Vector) -> None:
        """Multiply each head of x by the sigmoid of its gate, in place."""
        self._add_instruction("gate", second=gates, target=x, n=gates.size, k=x.size // gates.size)

    def activate(self, kind: str, x: Vector, up: Vector | None = None) -> Vector:
        """``silu(x) ⊙ up`` ("swiglu"), ``gelu(x)``, or ``x ⊙ up`` ("product")."""
        y = self.vector(x.size)
        self._add_instruction(
            "activate", kind=ACTIVATED.index(kind), source=x, second=up or x, target=y, n=x.size
        )
        return y

    def set_output(self, output: Vector) -> None:
        """End the program; `output` is its result."""
        self.output, self._widest = output, max(self._widest, self._width)
        self._written = (Instruction * len(self._instructions))(*self._instructions)

    def accepts_states(self, x: Tensor, states: Sequence[Tensor | None]) -> bool:
        """Whether the program can run on these states."""
        if len(states) != len(self.states):
            return False
        rows = x.shape[0]
        # A generator's calls would take longer than the checks.
        for i, (s, shape) in enumerate(zip(states, self.states, strict=True)):
            dtype = torch.float32 if i in self.sums else self.dtype
            if not isinstance(s, Tensor) or s.dtype != dtype or s.device.type != "cpu":
                return False
            if shape[1] == -1:  # keys or values, of any number of tokens
                if s.dim() != 4 or (*s.shape[:2], s.shape[3]) != (rows, shape[0], shape[2]):
                    return False
            elif s.shape != (rows, *shape) or not s.is_contiguous():
                return False
        return not self.windows or self._accepts_pasts(states)

    def _accepts_pasts(self, states: Sequence[Any]) -> bool:
        """Whether keys and values are of as many tokens, and not of more than a window keeps."""
        for i, window in self.windows.items():
            length = states[i].shape[2]
            if states[i + 1].shape[2] != length or (window is not None and length >= window):
                return False
        return True

    def run(
        self, x: Tensor, states: Sequence[Tensor], position: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run on contiguous fp32 ``x [B, ..., dim]``; returns ``[B, output]`` and the new states.

        position: ``[B]``, the tokens' positions, which only rotations need.
        """
        out, after = x.new_empty(x.shape[0], self.output.size), list(map(torch.empty_like, states))
        pasts, before = [], list(states)
        for i, window in self.windows.items():
            B, G, length, K = states[i].shape
            kept = length + 1 if window is None else min(length + 1, window - 1)
            for j in (i, i + 1):
                before[j], after[j] = before[j].contiguous(), before[j].new_empty(B, G, kept, K)
            pasts.append(Past(length, length, length + 1 - kept, kept, length))
        arguments = self.arguments(x.shape[0], before, after, position, pasts)
        arguments.input, arguments.out = x.data_ptr(), out.data_ptr()
        call_library("cumulant_program", arguments)
        return out, after

    def arguments(
        self,
        rows: int,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        position: Tensor | None,
        pasts: list[Past],
    ) -> Arguments:
        """The arguments of a run, but for its input and output."""
        if position is None and self._rotates:
            raise ValueError("position: expected [B], got None")
        output, pointers = self.output, _pointer * len(before)
        return Arguments(
            rows, self._widest, len(self._instructions), self.input.size, output.start, output.size,
            torch.get_num_threads(), instruction_set_number(), TYPES[self.dtype], self._written,
            None if position is None else position.data_ptr(), None, None,
            pointers(*map(Tensor.data_ptr, before)), pointers(*map(Tensor.data_ptr, after)),
            (Past * len(pasts))(*pasts),
        )  # fmt: skip

    def _add_state(self, *shape: int) -> int:
        self.states.append(shape)
        return len(self.states) - 1

    def _keep_weight(
        self, weight: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype
    ) -> None:
        if weight is None:
            return
        plain = (
            type(weight) in (Tensor, Parameter)
            and weight.dtype in (dtypes or DTYPES)
            and weight.device.type == "cpu"
        )
        if not plain or not weight.is_contiguous() or weight.shape != shape:
            raise Unsuitable
        self._weights.append(weight)

    def _widening(self, size: int, weight: Tensor | None) -> Vector | int:
        """Where weights of half precision are widened to fp32."""
        return -1 if weight is None or weight.dtype == torch.float32 else self.vector(size)

    def _add_instruction(self, operation: str, **fields: Any) -> None:
        weights = [fields[name] for name in ("weight", "bias") if fields.get(name) is not None]
        types = {w.dtype for w in weights if w.dtype != torch.uint8} or {torch.float32}
        if len(types) > 1:
            raise Unsuitable
        fields["type"] = TYPES[types.pop()]
        for name, x in fields.items():
            if isinstance(x, Vector):
                fields[name] = x.start
            elif isinstance(x, Tensor):
                fields[name] = x.data_ptr()
        self._instructions.append(Instruction(operation=OPERATIONS.index(operation), **fields))
