"""One-token steps of whole modules as native programs: laying them down, and telling when they still hold.

A module that can be stepped has ``lay(layer, x, onto)``, which lays its instructions down. With a state, it also has
``parts(state)``, the state's tensors in the order that these ask for, and ``assembled(parts, position)``, the state
again. What a program cannot do, and whatever may watch (gradients, hooks, tracing), takes the module's ordinary path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally

from ..ops.step import Program, Unsuitable, Vector, may_step
from .norms import RMSNorm, ScaleNorm

_METHODS = ("forward", "attend", "angles", "both")  # which a program takes the place of
_original: dict[type, dict[str, Any]] = {}
_Kind = TypeVar("_Kind", bound=type[nn.Module])


def steppable(kind: _Kind) -> _Kind:
    """A class, not its subclasses, that programs know how to take the place of, as long as its methods are these."""
    _original[kind] = {name: getattr(kind, name) for name in _METHODS if hasattr(kind, name)}
    return kind


for _kind in (RMSNorm, nn.RMSNorm, nn.LayerNorm, ScaleNorm, nn.Linear, nn.Dropout):
    steppable(_kind)


class Layer:
    """A program being laid down, and the modules it is made from."""

    def __init__(self, dim: int):
        self.program = Program(dim)
        self.modules: list[nn.Module] = []

    def take(self, module: nn.Module, *kinds: type[nn.Module]) -> None:
        """Rely on the module as it is now, which must be steppable, and of one of these kinds if any are named."""
        kind = type(module)
        if kind not in _original or (kinds and kind not in kinds):
            raise Unsuitable
        if any(getattr(kind, name) is not was for name, was in _original[kind].items()):
            raise Unsuitable
        for name, value in vars(module).items():
            if isinstance(value, Tensor) or (callable(value) and hasattr(kind, name)):
                raise Unsuitable  # a weight that is no parameter; a method set on the object
        self.modules.append(module)

    def norm(self, norm: Any, x: Vector) -> Vector:
        self.take(norm, RMSNorm, nn.RMSNorm, nn.LayerNorm, ScaleNorm)
        if isinstance(norm, ScaleNorm):
            return self.program.norm(x, "scalenorm", norm.eps, norm.weight)
        if norm.normalized_shape != (x.size,):
            raise Unsuitable
        if isinstance(norm, nn.LayerNorm):
            return self.program.norm(x, "layernorm", norm.eps, norm.weight, norm.bias)
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        return self.program.norm(x, "rmsnorm", eps, norm.weight)

    def project(self, projection: nn.Module, x: Vector, to: Vector | None = None, add: bool = False) -> Vector:
        self.take(projection, nn.Linear)
        return self.program.matrix(x, projection.weight, projection.bias, to, add)  # type: ignore[arg-type]

    def drop(self, dropout: nn.Module) -> None:
        """Which must do nothing."""
        self.take(dropout, nn.Dropout)
        if dropout.training and dropout.p > 0:  # type: ignore[operator]
            raise Unsuitable

    def child(self, module: nn.Module, x: Vector, onto: Vector | None, lay: str = "lay") -> Vector:
        """A module that lays itself down."""
        method = getattr(module, lay, None)
        if method is None:
            raise Unsuitable
        y: Vector = method(self, x, onto)
        return y


class _Laid:
    """The program of a module, or None where there can be none, and what that rests on.

    Modules are held weakly, as what is kept here lives as long as they do. What must be looked at before every step is
    kept in lists, which is several times as fast as module by module.
    """

    def __init__(self, module: nn.Module, lay: str, dim: int):
        layer = Layer(dim)
        self.program: Program | None = layer.program
        try:
            self.program.end(layer.child(module, self.program.input, None, lay))
        except Unsuitable:
            self.program = None
        self._modules = [ref(m) for m in layer.modules]
        self._kinds = list(map(type, layer.modules))
        methods = [(kind, name) for kind in set(self._kinds) for name in _original[kind]]
        self._owners, self._names = [kind for kind, _ in methods], [name for _, name in methods]
        self._methods = list(map(getattr, self._owners, self._names))
        attributes = list(map(vars, layer.modules))
        self._sizes = list(map(len, attributes))
        self._settings = [itemgetter("training", *_settings(a)) for a in attributes]
        self._values = [get(a) for get, a in zip(self._settings, attributes, strict=True)]
        children, self._parameters = _entries(attributes, "_modules"), _entries(attributes, "_parameters")
        self._children = [None if child is None else ref(child) for child in children]
        self._weights = [p for p in self._parameters if p is not None]
        self._places = _places(self._weights)

    def holds(self) -> bool:
        """Nothing has been set, replaced or moved since."""
        modules = [module() for module in self._modules]
        if None in modules or list(map(type, modules)) != self._kinds:
            return False
        attributes = list(map(vars, modules))
        if list(map(len, attributes)) != self._sizes:
            return False
        try:
            values = [get(a) for get, a in zip(self._settings, attributes, strict=True)]
        except KeyError:
            return False
        children = [None if child is None else child() for child in self._children]
        return (
            values == self._values
            and _same(_entries(attributes, "_modules"), children)
            and _same(_entries(attributes, "_parameters"), self._parameters)
            and _places(self._weights) == self._places
            and _same(list(map(getattr, self._owners, self._names)), self._methods)
        )

    def watched(self) -> bool:
        attributes = [vars(module()) for module in self._modules]
        hooks = (a[name] for a in attributes for name in ("_forward_hooks", "_forward_pre_hooks"))
        return any(hooks) or bool(globally._global_forward_hooks or globally._global_forward_pre_hooks)


def _settings(attributes: dict[str, Any]) -> list[str]:
    return [name for name, value in attributes.items() if type(value) in (bool, int, float, str, tuple, type(None))]


def _entries(attributes: list[dict[str, Any]], table: str) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, map(itemgetter(table), attributes))))


def _same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(map(is_, found, expected))


def _places(weights: list[Tensor]) -> tuple[list[Any], ...]:
    return (
        list(map(Tensor.data_ptr, weights)),
        list(map(Tensor.size, weights)),
        list(map(Tensor.stride, weights)),
        list(map(attrgetter("dtype"), weights)),
    )


_laid: WeakKeyDictionary[nn.Module, dict[tuple[str, int], _Laid]] = WeakKeyDictionary()


def step(
    module: nn.Module,
    x: Tensor,
    states: Sequence[Tensor | None] = (),
    position: Tensor | None = None,
    lay: str = "lay",
) -> tuple[Tensor, list[Tensor]] | None:
    """``x [B, 1, D]`` at ``position [B]`` through `module` -> ``[B, 1, D]`` and its new states, in one native call.

    None where that cannot be, and the ordinary path must run. lay: the method that laid the instructions down.
    """
    if not may_step(x):
        return None
    programs, key = _laid.setdefault(module, {}), (lay, x.shape[-1])
    laid = programs.get(key)
    if laid is None or not laid.holds():
        laid = programs[key] = _Laid(module, lay, x.shape[-1])
    program = laid.program
    if program is None or laid.watched() or not program.suits(x, states):
        return None
    if position is not None:
        if not isinstance(position, Tensor):
            return None
        if position.dtype != torch.int64 or position.shape != x.shape[:1] or position.device.type != "cpu":
            return None
        position = position.contiguous()
    y, after = program.run(x.contiguous(), states, position)  # type: ignore[arg-type]
    return y[:, None], after


def step_mixer(mixer: Any, x: Tensor, state: Any, module: nn.Module | None = None) -> tuple[Tensor, Any] | None:
    """A step of a mixer with its state, or of the `module` around it: the output and the new state, or None."""
    position: Any = getattr(state, "position", None)
    stepped = step(module or mixer, x, mixer.parts(state), position)
    return None if stepped is None else (stepped[0], mixer.assembled(stepped[1], position + 1))
