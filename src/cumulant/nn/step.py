"""One-token steps of whole modules as native programs: writing them down, and telling when they
still hold.

A module that can be stepped is an `EmitsStep`, a mixer with a state a `StepsWithState`. What a
program cannot do, and whatever may watch (gradients, hooks, tracing), takes the module's `forward`
instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter, is_, itemgetter, methodcaller
from types import FunctionType
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally

from ..ops.step import Program, Unsuitable, Vector, may_step
from .norms import RMSNorm, ScaleNorm


@runtime_checkable
class EmitsStep(Protocol):
    """A module that can write down one token's work."""

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """Add the instructions of ``forward`` on `x`, and return where its output comes. With
        `residual` the output is added to that vector, which is returned."""
        ...


@runtime_checkable
class StepsWithState(EmitsStep, Protocol):
    """A mixer that can write down one token's work with a state."""

    def state_tensors(self, state: object) -> list[Tensor | None]:
        """A state's tensors in the order of `emit_step`; none of another mixer's state."""
        ...

    def state_from_tensors(self, tensors: list[Tensor], position: Tensor) -> Any:
        """The state of which these are the tensors."""
        ...


def _steps_with_state(kind: type) -> bool:
    return issubclass(kind, StepsWithState)


# Whether modules of a class are `StepsWithState`: asked for every token, where `isinstance` would
# take longer.
steps_with_state: Callable[[type], bool] = cache(_steps_with_state)


Emit = Callable[[Any, "StepBuilder", Vector, Vector | None], Vector]
_Kind = TypeVar("_Kind", bound=type[nn.Module])
_methods: dict[type, dict[str, Any]] = {}  # of every class that programs know, as it was defined


def known_to_programs(kind: _Kind) -> _Kind:
    """A class, not its subclasses, that programs may take the place of, as long as its methods are
    these.
    """
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = (FunctionType, staticmethod)
    names = {
        name for base in own for name, value in vars(base).items() if isinstance(value, functions)
    }
    _methods[kind] = {
        name: getattr(kind, name) for name in sorted(names) if not name.startswith("__")
    }
    return kind


for _kind in (RMSNorm, nn.RMSNorm, nn.LayerNorm, ScaleNorm, nn.Linear, nn.Dropout):
    known_to_programs(_kind)


class StepBuilder:
    """A program being written, and the modules that it is made from."""

    def __init__(self, dim: int):
        self.program = Program(dim)
        self.modules: list[nn.Module] = []

    def rely_on(self, module: nn.Module, *kinds: type[nn.Module]) -> None:
        """Take the module as it is now, which must be known to programs, and of one of these kinds
        if any are named.
        """
        kind = type(module)
        if kind not in _methods or (kinds and kind not in kinds):
            raise Unsuitable
        if any(getattr(kind, name) is not was for name, was in _methods[kind].items()):
            raise Unsuitable
        for name, value in vars(module).items():
            if isinstance(value, Tensor) or (callable(value) and hasattr(kind, name)):
                raise Unsuitable  # a weight that is no parameter; a method set on the object
        self.modules.append(module)

    def norm(self, norm: Any, x: Vector) -> Vector:
        self.rely_on(norm, RMSNorm, nn.RMSNorm, nn.LayerNorm, ScaleNorm)
        if isinstance(norm, ScaleNorm):
            return self.program.norm(x, "scalenorm", norm.eps, norm.weight)
        if norm.normalized_shape != (x.size,):
            raise Unsuitable
        if isinstance(norm, nn.LayerNorm):
            return self.program.norm(x, "layernorm", norm.eps, norm.weight, norm.bias)
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        return self.program.norm(x, "rmsnorm", eps, norm.weight)

    def project(
        self, projection: nn.Module, x: Vector, to: Vector | None = None, add: bool = False
    ) -> Vector:
        self.rely_on(projection, nn.Linear)
        return self.program.matrix(x, projection.weight, projection.bias, to, add)  # type: ignore[arg-type]

    def require_no_dropout(self, dropout: nn.Module) -> None:
        self.rely_on(dropout, nn.Dropout)
        if dropout.training and dropout.p > 0:  # type: ignore[operator]
            raise Unsuitable

    def emit(self, module: nn.Module, x: Vector, residual: Vector | None) -> Vector:
        """The instructions of a module inside this one."""
        if not isinstance(module, EmitsStep):
            raise Unsuitable
        return module.emit_step(self, x, residual)


_get_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks")
_dereference: Any = methodcaller("__call__")


class CompiledStep:
    """The program of a module, or None where there can be none, and what that rests on.

    Modules are held weakly, as what is kept here lives as long as they do. What must be looked at
    before every step is kept in lists, and compared by functions of C, which is several times as
    fast as module by module.
    """

    def __init__(self, module: nn.Module, emit: Emit, dim: int):
        builder = StepBuilder(dim)
        self.program: Program | None = builder.program
        try:
            self.program.end(emit(module, builder, self.program.input, None))
        except Unsuitable:
            self.program = None
        self._modules = [ref(m) for m in builder.modules]
        self._kinds = list(map(type, builder.modules))
        methods = [(kind, name) for kind in set(self._kinds) for name in _methods[kind]]
        self._owners, self._names = [kind for kind, _ in methods], [name for _, name in methods]
        self._methods = list(map(getattr, self._owners, self._names))
        attributes: list[Any] = list(map(vars, builder.modules))
        self._sizes = list(map(len, attributes))
        self._settings = [itemgetter("training", *_settings(a)) for a in attributes]
        self._values = list(map(itemgetter.__call__, self._settings, attributes))
        children, self._parameters = (
            _entries(attributes, "_modules"),
            _entries(attributes, "_parameters"),
        )
        self._children: list[Any] = [
            type(None) if child is None else ref(child) for child in children
        ]
        self._weights = [p for p in self._parameters if p is not None]
        self._memory = _memory(self._weights)

    def is_current(self) -> bool:
        """Whether nothing has been set, replaced or moved since."""
        modules: list[Any] = list(map(_dereference, self._modules))
        if None in modules or list(map(type, modules)) != self._kinds:
            return False
        attributes: list[Any] = list(map(vars, modules))
        if list(map(len, attributes)) != self._sizes:
            return False
        try:
            values = list(map(itemgetter.__call__, self._settings, attributes))
        except KeyError:
            return False
        found = _entries(attributes, "_modules"), _entries(attributes, "_parameters")
        methods = list(map(getattr, self._owners, self._names))
        if list(map(len, found)) != [len(self._children), len(self._parameters)]:
            return False
        same = chain(
            map(is_, found[0], map(_dereference, self._children)),
            map(is_, found[1], self._parameters),
            map(is_, methods, self._methods),
        )
        return all(same) and values == self._values and _memory(self._weights) == self._memory

    def has_hooks(self) -> bool:
        """Whether a call of any of its modules would run something else too."""
        attributes = map(vars, map(_dereference, self._modules))
        hooks = any(chain.from_iterable(map(_get_hooks, attributes)))
        return hooks or bool(globally._global_forward_hooks or globally._global_forward_pre_hooks)


def _settings(attributes: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in attributes.items()
        if type(value) in (bool, int, float, str, tuple, type(None))
    ]


def _entries(attributes: list[dict[str, Any]], table: str) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, map(itemgetter(table), attributes))))


def _memory(weights: list[Tensor]) -> tuple[list[Any], ...]:
    """Where the weights lie, and how."""
    return (
        list(map(Tensor.data_ptr, weights)),
        list(map(Tensor.size, weights)),
        list(map(Tensor.stride, weights)),
        list(map(attrgetter("dtype"), weights)),
    )


_compiled: WeakKeyDictionary[nn.Module, dict[tuple[Emit, int], CompiledStep]] = WeakKeyDictionary()


def step(
    module: nn.Module,
    x: Tensor,
    states: Sequence[Tensor | None] = (),
    position: Tensor | None = None,
    emit: Emit | None = None,
) -> tuple[Tensor, list[Tensor]] | None:
    """``x [B, 1, D]`` at ``position [B]`` through `module` -> ``[B, 1, D]`` and its new states, in
    one native call.

    None where that cannot be, and `forward` must run. emit: what writes the instructions, by
    default `emit_step`.
    """
    if not may_step(x):
        return None
    written = type(module).emit_step if emit is None else emit  # type: ignore[attr-defined]
    programs, key = _compiled.setdefault(module, {}), (written, x.shape[-1])
    compiled = programs.get(key)
    if compiled is None or not compiled.is_current():
        compiled = programs[key] = CompiledStep(module, written, x.shape[-1])
    program = compiled.program
    if program is None or compiled.has_hooks() or not program.suits(x, states):
        return None
    if position is not None:
        if not isinstance(position, Tensor):
            return None
        if (
            position.dtype != torch.int64
            or position.shape != x.shape[:1]
            or position.device.type != "cpu"
        ):
            return None
        position = position.contiguous()
    y, after = program.run(x.contiguous(), states, position)  # type: ignore[arg-type]
    return y[:, None], after


def step_mixer(
    mixer: Any, x: Tensor, state: Any, module: nn.Module | None = None
) -> tuple[Tensor, Any] | None:
    """A step of a mixer with its state, or of the `module` around it: the output and the new state,
    or None.
    """
    position: Any = getattr(state, "position", None)
    stepped = step(module or mixer, x, mixer.state_tensors(state), position)
    return (
        None
        if stepped is None
        else (stepped[0], mixer.state_from_tensors(stepped[1], position + 1))
    )
