"""One-token steps of whole modules as native programs: laying them down, and telling when they still hold.

A module that can be stepped has ``lay(layer, x, onto)``, which lays its instructions down. With a state, it also has
``parts(state)``, the state's tensors in the order that these ask for, and ``assembled(parts, position)``, the state
again. What a program cannot do, and whatever may watch (gradients, hooks, tracing), takes the module's ordinary path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally

from ..ops.step import Program, Unsuitable, Vector, may_step
from .norms import RMSNorm, ScaleNorm
from .projection import Projection


class Layer:
    """A program being laid down, and the modules it is made from."""

    def __init__(self, dim: int):
        self.program = Program(dim)
        self.modules: list[nn.Module] = []

    def take(self, module: nn.Module, *kinds: type[nn.Module]) -> None:
        """Rely on the module, which must be of just one of these kinds, as it is now."""
        own = any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())
        if type(module) not in kinds or own:  # a method set on the object
            raise Unsuitable
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
        self.take(projection, Projection, nn.Linear)
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
    """The program of a module, or None where there can be none, and what that rests on."""

    def __init__(self, module: nn.Module, lay: str, dim: int):
        layer = Layer(dim)
        self.program: Program | None = layer.program
        try:
            self.program.end(layer.child(module, self.program.input, None, lay))
        except Unsuitable:
            self.program = None
        # `module` itself must not be held: its programs are kept for as long as it lives
        self._attributes = [vars(m) for m in layer.modules]
        self._copies = [dict(a) for a in self._attributes]
        self._tables = [a[name] for a in self._attributes for name in ("_parameters", "_modules")]
        self._entries = self._all_entries()
        self._hooks = [a[name] for a in self._attributes for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._weights = [x for x in self._entries if isinstance(x, Tensor)]
        self._places = list(map(Tensor.data_ptr, self._weights))

    def _all_entries(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))

    def holds(self) -> bool:
        """Nothing has been set, replaced or moved since."""
        entries = self._all_entries()
        return (
            len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and all(map(_equal, self._attributes, self._copies))
            and list(map(Tensor.data_ptr, self._weights)) == self._places
        )

    def watched(self) -> bool:
        return any(self._hooks) or bool(globally._global_forward_hooks or globally._global_forward_pre_hooks)


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    try:
        return a == b
    except RuntimeError:  # another tensor among them
        return False


_laid: WeakKeyDictionary[nn.Module, dict[str, _Laid]] = WeakKeyDictionary()


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
    programs = _laid.setdefault(module, {})
    laid = programs.get(lay)
    if laid is None or not laid.holds():
        laid = programs[lay] = _Laid(module, lay, x.shape[-1])
    program = laid.program
    if program is None or laid.watched() or x.shape[-1] != program.input.size or not program.suits(x, states):
        return None
    if position is not None:
        if position.dtype != torch.int64 or position.shape != x.shape[:1]:
            return None
        position = position.contiguous()
    y, after = program.run(x.contiguous(), states, position)  # type: ignore[arg-type]
    return y[:, None], after


def step_mixer(mixer: Any, x: Tensor, state: Any, module: nn.Module | None = None) -> tuple[Tensor, Any] | None:
    """A step of a mixer with its state, or of the `module` around it: the output and the new state, or None."""
    position: Any = getattr(state, "position", None)
    stepped = step(module or mixer, x, mixer.parts(state), position)
    return None if stepped is None else (stepped[0], mixer.assembled(stepped[1], position + 1))
