"""One-token steps of whole modules as native programs: how they are built, and when they are valid.

A module that can be stepped is an `EmitsStep`, and a mixer with a state is a `StepsWithState`. The
module's `forward` runs instead if a program cannot do its work. It also runs if hooks, gradients or
tracing could tell the difference.
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
from torch.nn.modules import module as module_globals

from ..ops.step import Program, Unsuitable, Vector, may_step
from .norms import RMSNorm, ScaleNorm


@runtime_checkable
class EmitsStep(Protocol):
    """A module that can emit the instructions for one token."""

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """Add the instructions of ``forward`` on `x`, and return the vector of its output.

        With `residual`, add the output to that vector and return it.
        """
        ...


@runtime_checkable
class StepsWithState(EmitsStep, Protocol):
    """A mixer that can emit the instructions for one token with a state."""

    def state_tensors(self, state: object) -> list[Tensor | None]:
        """A state's tensors in the order of `emit_step`, or [] for another mixer's state."""
        ...

    def state_from_tensors(self, tensors: list[Tensor], position: Tensor) -> Any:
        """The state that consists of these tensors."""
        ...


def _steps_with_state(kind: type) -> bool:
    return issubclass(kind, StepsWithState)


# Whether modules of a class are `StepsWithState`. Every token needs it, and `isinstance` is slower.
steps_with_state: Callable[[type], bool] = cache(_steps_with_state)


Emit = Callable[[Any, "StepBuilder", Vector, Vector | None], Vector]
_Kind = TypeVar("_Kind", bound=type[nn.Module])
_methods: dict[type, dict[str, Any]] = {}  # of each class that programs know, as defined


def known_to_programs(kind: _Kind) -> _Kind:
    """Let programs replace modules of this class while its methods are unchanged.

    Subclasses are not included.
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


_plain = (RMSNorm, nn.RMSNorm, nn.LayerNorm, ScaleNorm, nn.Linear, nn.Embedding, nn.Dropout)
for _kind in _plain:
    known_to_programs(_kind)


class StepBuilder:
    """A program under construction, and the modules that it is built from."""

    def __init__(self, dim: int, dtype: torch.dtype):
        self.program = Program(dim, dtype)
        self.modules: list[nn.Module] = []
        self.parents: list[nn.Module] = []

    def rely_on(self, module: nn.Module, *kinds: type[nn.Module]) -> None:
        """Let the program depend on the module's present weights and settings.

        The module must be known to programs, and of one of these classes if any are named.
        """
        kind = type(module)
        if kind not in _methods or (kinds and kind not in kinds):
            raise Unsuitable
        if any(getattr(kind, name) is not known for name, known in _methods[kind].items()):
            raise Unsuitable
        for name, value in vars(module).items():
            if isinstance(value, Tensor) or (callable(value) and hasattr(kind, name)):
                raise Unsuitable  # a weight that is no parameter, or a replaced method
        self.modules.append(module)

    def rely_on_children(self, *modules: nn.Module) -> None:
        """Let the program depend on which modules and parameters these have, and no more."""
        self.parents += modules

    def emit_norm(self, norm: Any, x: Vector) -> Vector:
        self.rely_on(norm, RMSNorm, nn.RMSNorm, nn.LayerNorm, ScaleNorm)
        if isinstance(norm, ScaleNorm):
            return self.program.norm(x, "scalenorm", norm.eps, norm.weight)
        if norm.normalized_shape != (x.size,):
            raise Unsuitable
        if isinstance(norm, nn.LayerNorm):
            return self.program.norm(x, "layernorm", norm.eps, norm.weight, norm.bias)
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        return self.program.norm(x, "rmsnorm", eps, norm.weight)

    def emit_projection(
        self, projection: nn.Module, x: Vector, to: Vector | None = None, add: bool = False
    ) -> Vector:
        """``W x + b``, written or added to the vector `to` if there is one.

        A layer with another matrix than `torch.nn.Linear`'s has a method `emit_matrix` for it.
        """
        layer: Any = projection
        if hasattr(type(layer), "emit_matrix"):
            emitted: Vector = layer.emit_matrix(self, x, to, add)
            return emitted
        self.rely_on(layer, nn.Linear)
        return self.program.matrix(x, layer.weight, layer.bias, to, add)

    def require_no_dropout(self, dropout: nn.Module) -> None:
        self.rely_on(dropout, nn.Dropout)
        if dropout.training and dropout.p > 0:  # type: ignore[operator]
            raise Unsuitable

    def emit_module(self, module: nn.Module, x: Vector, residual: Vector | None) -> Vector:
        """The instructions of a module inside this one."""
        if not isinstance(module, EmitsStep):
            raise Unsuitable
        return module.emit_step(self, x, residual)


_get_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks")
_resolve: Any = methodcaller("__call__")


class CompiledStep:
    """The program of a module, or None if it cannot have one, and all that this depends on.

    Modules are referenced weakly, as an entry here exists as long as its module. All values that
    must be compared before every step are in lists, which functions in C compare. That is several
    times as fast as a loop over modules.
    """

    def __init__(self, module: nn.Module, emit: Emit, dim: int, dtype: torch.dtype):
        builder = StepBuilder(dim, dtype)
        self.program: Program | None = builder.program
        try:
            self.program.set_output(emit(module, builder, self.program.input, None))
        except Unsuitable:
            self.program = None
        self._modules = [ref(m) for m in builder.modules]
        self._kinds = list(map(type, builder.modules))
        self._parents = [ref(m) for m in builder.parents]
        methods = [(kind, name) for kind in set(self._kinds) for name in _methods[kind]]
        self._owners, self._names = [kind for kind, _ in methods], [name for _, name in methods]
        self._methods = list(map(getattr, self._owners, self._names))
        attributes: list[Any] = list(map(vars, builder.modules))
        self._attribute_counts = list(map(len, attributes))
        self._settings = [itemgetter("training", *_setting_names(a)) for a in attributes]
        self._values = list(map(itemgetter.__call__, self._settings, attributes))
        owners = attributes + list(map(vars, builder.parents))
        children, self._parameters = (
            _table_entries(owners, "_modules"),
            _table_entries(owners, "_parameters"),
        )
        self._children: list[Any] = [
            type(None) if child is None else ref(child) for child in children
        ]
        self._weights = [p for p in self._parameters if p is not None]
        self._memory = _memory_layout(self._weights)

    def is_current(self) -> bool:
        """Whether no setting, module, method or weight has changed since."""
        modules: list[Any] = list(map(_resolve, self._modules))
        parents: list[Any] = list(map(_resolve, self._parents))
        if None in modules or None in parents or list(map(type, modules)) != self._kinds:
            return False
        attributes: list[Any] = list(map(vars, modules))
        if list(map(len, attributes)) != self._attribute_counts:
            return False
        try:
            values = list(map(itemgetter.__call__, self._settings, attributes))
        except KeyError:
            return False
        owners = attributes + list(map(vars, parents))
        found = _table_entries(owners, "_modules"), _table_entries(owners, "_parameters")
        methods = list(map(getattr, self._owners, self._names))
        if list(map(len, found)) != [len(self._children), len(self._parameters)]:
            return False
        same = chain(
            map(is_, found[0], map(_resolve, self._children)),
            map(is_, found[1], self._parameters),
            map(is_, methods, self._methods),
        )
        return (
            all(same) and values == self._values and _memory_layout(self._weights) == self._memory
        )

    def has_hooks(self) -> bool:
        """Whether calling any of its modules would run a hook."""
        return has_hooks(*map(_resolve, self._modules))


def has_hooks(*modules: nn.Module) -> bool:
    """Whether calling any of the modules would run a hook."""
    return any(chain.from_iterable(map(_get_hooks, map(vars, modules)))) or bool(
        module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks
    )


def _setting_names(attributes: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in attributes.items()
        if isinstance(value, (bool, int, float, str, tuple, type(None)))
    ]


def _table_entries(attributes: list[dict[str, Any]], table: str) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, map(itemgetter(table), attributes))))


def _memory_layout(weights: list[Tensor]) -> tuple[list[Any], ...]:
    """The addresses, shapes, strides and dtypes of the weights."""
    return (
        list(map(Tensor.data_ptr, weights)),
        list(map(Tensor.size, weights)),
        list(map(Tensor.stride, weights)),
        list(map(attrgetter("dtype"), weights)),
    )


_Key = tuple[Emit, int, torch.dtype]
_compiled: WeakKeyDictionary[nn.Module, dict[_Key, CompiledStep]] = WeakKeyDictionary()


def compiled_step(module: nn.Module, emit: Emit, x: Tensor) -> CompiledStep:
    """The module's program for inputs such as ``x [..., D]``, written anew if anything changed."""
    programs, key = _compiled.setdefault(module, {}), (emit, x.shape[-1], x.dtype)
    compiled = programs.get(key)
    if compiled is None or not compiled.is_current():
        compiled = programs[key] = CompiledStep(module, *key)
    return compiled


def step(
    module: nn.Module,
    x: Tensor,
    states: Sequence[Tensor | None] = (),
    position: Tensor | None = None,
    emit: Emit | None = None,
) -> tuple[Tensor, list[Tensor]] | None:
    """Run `module` in one native call: ``x [B, 1, D]`` -> ``[B, 1, D]`` and the new states.

    None means that `forward` must run instead. position: ``[B]``. emit: the method that emits
    the instructions, by default `emit_step`.
    """
    if not may_step(x):
        return None
    emit = type(module).emit_step if emit is None else emit  # type: ignore[attr-defined]
    compiled = compiled_step(module, emit, x)
    program = compiled.program
    if program is None or compiled.has_hooks() or not program.accepts_states(x, states):
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
    y, after = program.run(x.float().contiguous(), states, position)  # type: ignore[arg-type]
    return y[:, None].to(x.dtype), after


def step_mixer(
    mixer: Any, x: Tensor, state: Any, module: nn.Module | None = None
) -> tuple[Tensor, Any] | None:
    """A step of a mixer, or of the `module` around it: output and new state, or None as `step`."""
    position: Any = getattr(state, "position", None)
    stepped = step(module or mixer, x, mixer.state_tensors(state), position)
    return (
        None
        if stepped is None
        else (stepped[0], mixer.state_from_tensors(stepped[1], position + 1))
    )


def step_alone(mixer: Any, x: Tensor, state: Any, return_state: bool, *others: Any) -> Any:
    """`step_mixer` of a call from state to state and without `others`, or None."""
    if state is None or not return_state or any(other is not None for other in others):
        return None
    return step_mixer(mixer, x, state)
