"""Building ONNX graphs: nodes, weights in one file beside them, and states as inputs and outputs.

Everything is fp32 unless a function says otherwise. A value in a graph is known by its name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Value = str  # the name of a value in a graph
OPSET = 27  # the first with LinearAttention
IR_VERSION = 13
OPERATORS = ("standard", "onnxruntime")
SMALL = 1024  # bytes up to which a weight is stored in the graph itself
ALIGNMENT = 64  # of weights in their file, in bytes
POSITION = "past.position"  # the state that counts the tokens, int64 [1]
LAST = 2**63 - 1  # the end of a slice that goes to the end
TYPES = {"float32": 1, "int64": 7, "bool": 9, "float64": 11}  # as in onnx.TensorProto


def import_onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "exporting to ONNX needs the package onnx: pip install 'cumulant[onnx]'"
        ) from error
    return onnx


class Weights:
    """The weights of all graphs of a model, each of them once in one file."""

    def __init__(self, file: str):
        self.file, self.size = file, 0
        self._places: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._entries: list[tuple[int, tuple[Tensor, ...], bool]] = []
        self._derived: dict[str, Tensor] = {}

    def derive(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is computed from the model, the same one for every graph."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    def place(self, parts: tuple[Tensor, ...], transposed: bool) -> tuple[int, int]:
        """Offset and bytes of the joined parts in the file."""
        key = (*((p.data_ptr(), tuple(p.shape), p.stride()) for p in parts), transposed)
        if key not in self._places:
            begin = -(-self.size // ALIGNMENT) * ALIGNMENT
            length = 4 * sum(p.numel() for p in parts)
            self._places[key] = begin, length
            self._entries.append((begin, parts, transposed))
            self.size = begin + length
        return self._places[key]

    def write(self, folder: Path) -> None:
        with (folder / self.file).open("wb") as file:
            for begin, parts, transposed in self._entries:
                file.write(b"\0" * (begin - file.tell()))
                file.write(joined(parts, transposed).numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())


def joined(parts: Sequence[Tensor], transposed: bool) -> Tensor:
    """Parts side by side: matrices ``[out, in]`` as ``[in, out]`` if transposed."""
    wide = [p.detach().cpu().float() for p in parts]
    return torch.cat([p.mT for p in wide] if transposed else wide, -1 if transposed else 0)


@dataclass(frozen=True)
class StateEntry:
    """A state of the graphs. shape: numbers, and letters for sizes that a call chooses.

    initial: the number that fills it before the first token.
    """

    input: str
    output: str
    shape: tuple[int | str, ...]
    dtype: str
    initial: float


class GraphBuilder:
    """One graph under construction.

    Args:
        weights: shared with the model's other graphs.
        step: the graph reads one token a call.
        operators: "standard", or "onnxruntime" for its own `LinearAttention` too.
    """

    def __init__(self, weights: Weights, *, step: bool, operators: str = "standard"):
        self._onnx, self._weights = import_onnx(), weights
        self.step, self.operators = step, operators
        self.states: list[StateEntry] = []
        self.layer: int | None = None  # whose states are named after it
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._after: dict[Value, Value] = {}
        self._made: dict[Any, Value] = {}
        self._names: Counter[str] = Counter()
        self._parts: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name the nodes and refusals inside after a part of the model."""
        self._parts.append(name)
        yield  # after an error the builder is of no use
        self._parts.pop()

    @property
    def part_name(self) -> str:
        return ".".join(self._parts)

    def refuse(self, reason: str) -> ValueError:
        """The error for a part of the model that cannot be exported."""
        return ValueError(f"model: {self.part_name} cannot be exported to ONNX: {reason}")

    def new_name(self, kind: str) -> str:
        stem = f"{self.part_name}.{kind}" if self._parts else kind
        self._names[stem] += 1
        count = self._names[stem]
        return stem if count == 1 else f"{stem}_{count}"

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Add a node with one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(
        self, kind: str, count: int, *inputs: Value, domain: str = "", **attributes: Any
    ) -> list[Value]:
        """Add a node with `count` outputs."""
        name = self.new_name(kind)
        outputs = [name] if count == 1 else [f"{name}.{i}" for i in range(count)]
        node = self._onnx.helper.make_node(
            kind, list(inputs), outputs, name=name, domain=domain, **attributes
        )
        self._nodes.append(node)
        return outputs

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        """A value that several parts of the graph read, computed by the first of them."""
        if key not in self._made:
            parts, self._parts = self._parts, []
            self._made[key] = make()
            self._parts = parts
        return self._made[key]

    def constant(self, numbers: Any, dtype: str = "int64") -> Value:
        """A constant in the graph; equal ones are stored once."""
        import numpy as np

        array = np.asarray(numbers, dtype)
        key = f"{dtype}{list(array.shape)} {array.tobytes().hex()}"
        if key not in self._made:
            name = self._made[key] = f"constant_{len(self._initializers)}"
            self._initializers[name] = self._onnx.numpy_helper.from_array(array, name)
        return self._made[key]

    def weight(self, *parts: Tensor, transposed: bool = False) -> Value:
        """Weights in fp32, several of them side by side; matrices as ``[in, out]`` if transposed.

        They belong to the model, or come from `derive`.
        """
        begin, length = self._weights.place(parts, transposed)
        name = f"weight_{begin}"
        if name in self._initializers:
            return name
        rows = sum(p.shape[0] for p in parts)
        shape = [parts[0].shape[1], rows] if transposed else [rows, *parts[0].shape[1:]]
        tensor = self._onnx.TensorProto(name=name, dims=shape, data_type=TYPES["float32"])
        if length <= SMALL:
            tensor.raw_data = joined(parts, transposed).numpy().tobytes()
        else:
            tensor.data_location = self._onnx.TensorProto.EXTERNAL
            place = {"location": self._weights.file, "offset": begin, "length": length}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def derive(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """See `Weights.derive`."""
        return self._weights.derive(name, make)

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> Value:
        self._inputs.append(self._describe(name, dtype, shape))
        return name

    def output(self, name: str, value: Value, dtype: str, shape: Sequence[int | str]) -> None:
        node = self._onnx.helper.make_node("Identity", [value], [name], name=f"output.{name}")
        self._nodes.append(node)
        self._outputs.append(self._describe(name, dtype, shape))

    def past(
        self, name: str, shape: Sequence[int | str], dtype: str = "float32", initial: float = 0.0
    ) -> Value:
        """A state before the tokens of this call; `present` sets it after them.

        A size "S" is 0 before the first token and grows with every token.
        """
        full = name if self.layer is None else f"{self.layer}.{name}"
        entry = StateEntry(f"past.{full}", f"present.{full}", tuple(shape), dtype, initial)
        self.states.append(entry)
        return self.input(entry.input, dtype, shape)

    def present(self, past: Value, value: Value) -> None:
        """Say which value a state has after the tokens of this call."""
        self._after[past] = value

    def return_states(self) -> None:
        """Make all states outputs, in their order."""
        for entry in self.states:
            grown = ["S + T" if size == "S" else size for size in entry.shape]
            self.output(entry.output, self._after[entry.input], entry.dtype, grown)

    def body(
        self,
        inputs: Sequence[tuple[str, str]],
        outputs: Sequence[str],
        emit: Callable[..., Sequence[Value]],
    ) -> Any:
        """A graph inside a node. inputs: names and dtypes. outputs: dtypes.

        emit: adds its nodes, from the inputs to the outputs. It may read values outside.
        """
        nodes, self._nodes = self._nodes, []
        found = emit(*(name for name, _ in inputs))
        inner, self._nodes = self._nodes, nodes
        return self._onnx.helper.make_graph(
            inner,
            self.new_name("body"),
            [self._describe(name, dtype, None) for name, dtype in inputs],
            [self._describe(n, dtype, None) for n, dtype in zip(found, outputs, strict=True)],
        )

    def _describe(self, name: str, dtype: str, shape: Sequence[int | str] | None) -> Any:
        return self._onnx.helper.make_tensor_value_info(name, TYPES[dtype], shape)

    def model(self, name: str) -> Any:
        """The finished model, whose weights `Weights.write` stores."""
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes,
            name,
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain for node in self._nodes):
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cumulant"
        )
