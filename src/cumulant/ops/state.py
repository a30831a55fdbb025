"""States: the past of a causal operation or module, as immutable values.

A state is a frozen dataclass of tensors and of further states, with the batch in front. It is a
pytree, so `torch.compile`, `torch.export` and `torch.utils._pytree` handle it. Nothing in this
library writes into a state.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="State")
STRUCTURE = "cumulant.state"  # the metadata of a file that describes the structure of its state


@dataclass(frozen=True)
class State:
    """Base of all states. Fields are tensors with the batch in front, states, tuples or None."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # the one that dataclass writes would print every number
        cls.__repr__ = State.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Shapes, dtypes, positions and bytes; the thousands of numbers are left out."""
        parts = (f"{f.name}={_format_field(f.name, getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(parts)}; {self.nbytes:,} bytes)"

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The same state with `function` applied to every tensor."""
        return type(self)(
            **{f.name: _map_tensors(getattr(self, f.name), function) for f in fields(self)}
        )

    def clone(self: S) -> S:
        """A copy of every tensor."""
        return self.map(torch.Tensor.clone)

    def detach(self: S) -> S:
        """The same numbers without their gradients' history."""
        return self.map(torch.Tensor.detach)

    def to(self: S, device: torch.device | str) -> S:
        """Every tensor on `device`. Dtypes do not change: sums must stay in fp32 or fp64."""
        return self.map(lambda x: x.to(device))

    def select(self: S, index: Tensor) -> S:
        """The rows ``index [N]`` (int64) of the batch: reorders beams, drops or repeats rows."""
        return self.map(lambda x: x.index_select(0, index.to(x.device)))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its dotted name."""
        return dict(_named_tensors("", self))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the state."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())


@dataclass(frozen=True)
class LinearState(State):
    """The sums of kernelised and Taylor attention, in fp32 (fp64 for fp64 inputs).

    numerator: ``[B, G, F, V]``, Σ_j φ(k_j) v_jᵀ.
    denominator: ``[B, G, F]``, Σ_j φ(k_j); None when the operation does not normalise.
    position: ``[B]`` int64, the number of keys summed; masked keys do not count.

    Taylor features are ordered by degree, then lexicographically by their indices. Each has the
    weight ``sqrt(multinomial / p!)``. Every implementation reads and writes this layout.
    """

    numerator: Tensor
    denominator: Tensor | None
    position: Tensor


@dataclass(frozen=True)
class KeyValueState(State):
    """Keys and values seen so far: the state of quadratic attention, which grows.

    key: ``[B, G, S, K]``.
    value: ``[B, G, S, V]``.
    mask: ``[B, S]`` bool, or None if no key is masked.
    position: ``[B]`` int64, the number of tokens seen; masked tokens do not count.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None
    position: Tensor


@dataclass(frozen=True)
class MixedChunkState(State):
    """The state of causal mixed chunk attention, in fp32 (fp64 for fp64 inputs).

    numerator: ``[B, G, K, V]``, Σ_j lin_key_j value_jᵀ over all tokens of complete groups.
    quad_key, lin_key, value: ``[B, G, g, ·]``, the tokens after the last complete group. The first
        ``position % g`` slots are filled, and the others are zero.
    position: ``[B]`` int64, the number of tokens seen; masked tokens do not count.
    """

    numerator: Tensor
    quad_key: Tensor
    lin_key: Tensor
    value: Tensor
    position: Tensor


@dataclass(frozen=True)
class ElitaState(State):
    """The state of ELiTA's attention: G · (V + 1) numbers a sequence of any length, in fp64.

    log_weight: ``[B, G]``, m = log Σ_j exp(c_j); -inf before the first key.
    mean: ``[B, G, V]``, u = Σ_j exp(c_j - m) v_j.
    position: ``[B]`` int64, the number of keys; masked keys do not count.

    In fp32, m would have errors of 1e-3 where logits are near 1e4. And u would stop changing once
    the weight of a single token falls below its last digit.
    """

    log_weight: Tensor
    mean: Tensor
    position: Tensor


def register_state(kind: type[State]) -> None:
    """Make a state class a pytree node, for torch.compile, torch.export and its saved programs."""
    name = f"{kind.__module__}:{kind.__name__}"
    torch.utils._pytree.register_dataclass(kind, serialized_type_name=name)


for _kind_of_state in (LinearState, KeyValueState, MixedChunkState, ElitaState):
    register_state(_kind_of_state)


def _format_field(name: str, part: Any) -> str:
    """The text of one field: its shape, or its numbers if it is a short position.

    Entries of a tuple with the same text are written once, with their count.
    """
    if isinstance(part, tuple):
        counts = Counter(_format_field(name, p) for p in part)
        return (
            f"({', '.join(shown if n == 1 else f'{n} x {shown}' for shown, n in counts.items())})"
        )
    if not isinstance(part, Tensor):
        return repr(part)
    if (
        name == "position"
        and type(part) is Tensor
        and part.dim() == 1
        and part.numel() <= 8
        and not part.is_meta
    ):
        try:
            return str(part.tolist())
        except RuntimeError:  # numbers cannot be read under torch.func and while compiling
            pass
    return f"{str(part.dtype).removeprefix('torch.')}{list(part.shape)}"


def _describe_structure(part: Any) -> Any:
    """The structure as JSON: a class name for a state, a list for a tuple, "tensor" or null."""
    if isinstance(part, State):
        kind = f"{type(part).__module__}:{type(part).__name__}"
        return {
            "kind": kind,
            "parts": {f.name: _describe_structure(getattr(part, f.name)) for f in fields(part)},
        }
    if isinstance(part, tuple):
        return [_describe_structure(p) for p in part]
    return "tensor" if isinstance(part, Tensor) else None


def _find_state_class(name: str) -> type[State] | None:
    """The state class that a file names, or None; only classes of this package are looked up."""
    module, _, attribute = name.partition(":")
    if not re.fullmatch(r"cumulant(\.\w+)+", module):
        return None
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:  # of a package on the way
        return None
    found = getattr(importlib.import_module(module), attribute, None)
    return found if isinstance(found, type) and issubclass(found, State) else None


def _rebuild_state(shape: Any, prefix: str, tensors: dict[str, Tensor], path: str) -> Any:
    """The value that a structure `shape` describes, whose tensors' names begin with `prefix`."""
    if isinstance(shape, dict):
        kind, parts = _find_state_class(str(shape.get("kind"))), shape.get("parts")
        if (
            kind is None
            or not isinstance(parts, dict)
            or set(parts) != {f.name for f in fields(kind)}
        ):
            raise ValueError(
                f"{path}: holds a state of a kind this version does not know: {shape.get('kind')!r}"
            )
        return kind(
            **{
                k: _rebuild_state(v, f"{prefix}.{k}" if prefix else k, tensors, path)
                for k, v in parts.items()
            }
        )
    if isinstance(shape, list):
        return tuple(_rebuild_state(s, f"{prefix}.{i}", tensors, path) for i, s in enumerate(shape))
    if shape is None:
        return None
    if shape != "tensor" or prefix not in tensors:
        raise ValueError(
            f"{path}: the tensor {prefix!r} of the state is missing; the file is damaged"
        )
    return tensors[prefix]


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saving and loading states needs safetensors: pip install safetensors"
        ) from error
    return safetensors


def save_state(
    path: str | os.PathLike[str], state: State, metadata: dict[str, str] | None = None
) -> None:
    """Write a state to a safetensors file, atomically.

    If writing fails, an existing file stays as it was. A symbolic link is followed.

    Args:
        path: the file.
        state: any state of this package.
        metadata: strings to store with it, which ``load_state(..., return_metadata=True)`` returns.

    Raises:
        TypeError: `state` is not a state, or `metadata` has a key or value that is not a string.
        ValueError: `metadata` has the reserved key "cumulant.state".
        OSError: `path` is a folder, its folder does not exist, or it cannot be written.
    """
    if not isinstance(state, State):
        raise TypeError(f"state: expected a cumulant state, got {type(state).__name__}")
    for key, value in (metadata or {}).items():
        for part in (key, value):
            if not isinstance(part, str):
                raise TypeError(
                    f"metadata: expected strings, got {type(part).__name__} {part!r} in {key!r}"
                )
    if STRUCTURE in (metadata or {}):
        raise ValueError(
            f"metadata: the key {STRUCTURE!r} is reserved for the state's structure; choose another"
        )
    library = _import_safetensors()
    target = _writable_target(path)
    header = {**(metadata or {}), STRUCTURE: json.dumps(_describe_structure(state))}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors().items()}
    temporary = target.with_name(f".{target.name[:40]}.{os.getpid()}.tmp")
    try:
        library.torch.save_file(tensors, temporary, metadata=header)
        os.replace(temporary, target)
    except library.SafetensorError as error:  # raised also when the disk is full
        raise OSError(f"{path}: the state could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check before long work that `save_state` will be able to write to `path`.

    Raises:
        OSError: `path` is not a regular file, or its folder does not exist or cannot be written to.
    """
    target = _writable_target(path)
    try:
        with tempfile.TemporaryFile(dir=target.parent, prefix=f".{target.name[:40]}."):
            pass
    except OSError as error:
        raise type(error)(f"{path}: cannot be written: {error.strerror}") from error


def _writable_target(path: str | os.PathLike[str]) -> Path:
    """The file to write for `path`, with links followed."""
    if not os.fspath(path):
        raise FileNotFoundError(
            "expected the name of a file to save the state in, got an empty one"
        )
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file to save the state in")
    if target.exists() and not target.is_file():
        raise OSError(f"{path}: is not a regular file; name another to save the state in")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: cannot be written: no such folder: {target.parent}")
    return target


def load_state(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    return_metadata: bool = False,
) -> Any:
    """Read a state written by `save_state`.

    Args:
        path: the file.
        device: where the tensors go.
        return_metadata: return ``(state, metadata)``, with the strings stored by `save_state`.

    Raises:
        ValueError: the file does not hold a state, or is damaged.
        OSError: the file does not exist or cannot be read.
    """
    library = _import_safetensors()
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a folder; name the file that a state was saved in")
    try:
        with library.safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except library.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    if STRUCTURE not in header:
        raise ValueError(
            f"{path}: a safetensors file, but not a state written by cumulant.save_state"
        )
    try:
        structure = json.loads(header.pop(STRUCTURE))
    except ValueError as error:
        raise ValueError(
            f"{path}: the structure of the state cannot be read; the file is damaged"
        ) from error
    if not isinstance(structure, dict):
        raise ValueError(
            f"{path}: the structure of the state is not a JSON object; the file is damaged"
        )
    state = _rebuild_state(structure, "", tensors, str(path))
    return (state, header) if return_metadata else state


# These two are not nested functions. A nested function that calls itself is a reference cycle, and
# would keep tensors alive until the garbage collector runs.


def _map_tensors(part: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(part, State):
        return part.map(function)
    if isinstance(part, tuple):
        return tuple(_map_tensors(p, function) for p in part)
    return function(part) if isinstance(part, Tensor) else part


def _named_tensors(prefix: str, part: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        yield prefix, part
    elif isinstance(part, tuple):
        for i, p in enumerate(part):
            yield from _named_tensors(f"{prefix}.{i}", p)
    elif isinstance(part, State):
        for f in fields(part):
            yield from _named_tensors(
                f"{prefix}.{f.name}" if prefix else f.name, getattr(part, f.name)
            )
