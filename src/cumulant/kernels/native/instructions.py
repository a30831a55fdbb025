"""Instructions of programs, on vectors of one token's numbers: all but attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..quantized import groups_of, row_bytes
from .library import TYPES, Instruction

OPERATIONS = (  # in the order of Operation in src/abi.hpp
    *("norm", "matrix", "convolution", "shift"),
    *("rotary", "attend", "gate", "activate", "decay", "softmax"),
    *("copies", "sinusoid", "mixed", "position_logits", "elita", "outer"),
)
# those whose numbers depend on other tokens or on a token's place
PLACED = {
    *("convolution", "shift", "rotary", "attend", "softmax"),
    *("sinusoid", "mixed", "position_logits", "elita"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("rmsnorm", "layernorm", "scalenorm")
ACTIVATED = ("swiglu", "gelu", "product", "silu", "clamp")
WEIGHTS = ("weight", "bias", "amplitudes")
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


class Instructions:
    """Instructions for one token. `input` is its vector of `dim` numbers.

    Weights are in fp32, bf16 or fp16. dtype: of the states that hold a token's own numbers.
    """

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self._width = self._widest = 0  # numbers of a row that are in use now, and at most
        self.input = self.vector(dim)
        self.states: list[tuple[int, ...]] = []  # the shape of each state, without the batch
        self.state_dtypes: list[torch.dtype] = []
        self.initial: list[float] = []  # of each state, its numbers before the first token
        self.tail = 0  # from this instruction on, only tokens whose output is wanted are computed
        self.replaced: list[int] = []  # states that no run can change in place
        self.windows: dict[int, int | None] = {}  # of states of keys, each before one of values
        self._instructions: list[Instruction] = []
        self._weights: list[Tensor] = []  # kept alive, because instructions have their addresses
        self._arguments: list[Any] = []  # kept alive, as weights are
        self.needs_position = False

    def vector(self, size: int) -> Vector:
        """A new vector, whose start is a multiple of 16 numbers."""
        start = self._width
        self._width += -(-size // 16) * 16
        return Vector(start, size)

    def begin_tail(self) -> None:
        """Tell that what follows needs of each token only the vectors that there are."""
        self.tail = len(self._instructions)

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

    def shift(self, x: Vector, first_half: bool = False) -> Vector:
        """Take half of the numbers from the token before, of an odd number the smaller second or
        the larger first half; state ``[1, half]``.
        """
        y, shifted = self.vector(x.size), (x.size + first_half) // 2
        self._add_instruction(
            "shift", kind=int(first_half), source=x, target=y, n=x.size - shifted, k=shifted,
            state=self._add_state(1, shifted),
        )  # fmt: skip
        return y

    def rotate(self, x: Vector, dim: int, base: float, rotated: int | None = None) -> None:
        """Rotate the heads of x, each of `dim` numbers, in place, by rotary positions.

        rotated: only the first ones of each head.
        """
        self.needs_position = True
        self._add_instruction(
            "rotary", target=x, n=x.size // dim, k=dim, rotated=rotated or dim, scalar=base
        )

    def add_sinusoid(self, x: Vector, weight: Tensor, base: float) -> None:
        """Add the sines and cosines of positions, times a single weight, in place."""
        self.needs_position = True
        self._keep_weight(weight, (1,))
        self._add_instruction("sinusoid", target=x, n=x.size, weight=weight, scalar=base)

    def copies(self, x: Vector, scale: Tensor, offset: Tensor) -> Vector:
        """``x ⊙ scale[i] + offset[i]`` for each row i of these."""
        y = self.vector(scale.numel())
        self._keep_weight(scale, (y.size // x.size, x.size))
        self._keep_weight(offset, tuple(scale.shape))
        self._add_instruction(
            "copies", source=x, target=y, n=len(scale), k=x.size, weight=scale, bias=offset,
            fourth=self._widening(2 * y.size, scale),
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
        """``silu(x) ⊙ up`` ("swiglu"), ``silu(x)``, ``gelu(x)``, or ``x ⊙ up`` ("product")."""
        y = self.vector(x.size)
        self._add_instruction(
            "activate", kind=ACTIVATED.index(kind), source=x, second=up or x, target=y, n=x.size
        )
        return y

    def clamp(self, x: Vector, limit: float) -> Vector:
        """``x`` between ``-limit`` and ``limit``."""
        y = self.vector(x.size)
        self._add_instruction(
            "activate", kind=ACTIVATED.index("clamp"), source=x, second=x, target=y, n=x.size,
            scalar=limit,
        )  # fmt: skip
        return y

    def outer(self, x: Vector, y: Vector) -> Vector:
        """All products: number ``i * y.size + j`` is ``x_i y_j``."""
        products = self.vector(x.size * y.size)
        self._add_instruction("outer", source=x, second=y, target=products, n=x.size, k=y.size)
        return products

    def _add_state(
        self, *shape: int, dtype: torch.dtype | None = None, initial: float = 0.0
    ) -> int:
        self.states.append(shape)
        self.state_dtypes.append(dtype or self.dtype)
        self.initial.append(initial)
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
        weights = [fields[name] for name in WEIGHTS if fields.get(name) is not None]
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
