"""Calls of linear and Taylor attention that repeat an earlier one with other numbers.

Whatever a call checks and chooses follows from its options and from the shapes, strides and dtypes
of its tensors. So a call that has these in common with an earlier one, as each token of a decoder
and each step of a training, need not check and choose again. Otherwise this takes longer than the
arithmetic of a short call.

Only plain calls of the native kernels are remembered: those without masks and packed sequences, on
the CPU, that nothing traces or transforms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..kernels.native.library import GrowingWeights
from ..kernels.native.repeated_attention import RepeatedAttention
from ..kernels.operators.attention import OPERATOR
from ..kernels.spec import AttentionInputs, AttentionSpec
from .checks import check_signs
from .dispatch import Plan, implementation_variable
from .state import LinearState

MOST = 512  # signatures, after which the memory begins anew
STRIDED, LAYOUT = torch.strided, "_layout"
PLAIN_TENSORS = (Tensor, Parameter)
PLAIN_OPTIONS = frozenset((str, bool, int, float, type(None)))
Signature = tuple[Any, ...]


@dataclass
class Repeated:
    """What calls with one signature have in common."""

    call: RepeatedAttention
    normalize: bool
    returns_state: bool
    layout: tuple[Any, ...] | None = None  # of the states that they return

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        state: LinearState | None,
    ) -> Tensor | tuple[Tensor, LinearState]:
        """The result of the operation."""
        S = z = None
        if state is not None:
            S, z = state.numerator, state.denominator if self.normalize else None
        inputs, call = AttentionInputs(query, key, value, None, None, S, z, log_decay), self.call
        try:
            if torch.is_grad_enabled() and OPERATOR.differentiates(inputs):
                out, _, S, z = OPERATOR.run_differentiably("native", inputs, call.spec, call)
            else:
                out, _, S, z = call.forward_only(inputs, call.spec)
        except GrowingWeights:
            assert log_decay is not None
            check_signs(log_decay)
            raise
        if out.dtype != query.dtype:
            out = out.to(query.dtype)
        if not self.returns_state:
            return out
        if state is None:
            position = torch.full(
                (key.shape[0],), key.shape[2], dtype=torch.int64, device=key.device
            )
        else:
            position = state.position + key.shape[2]
        end = LinearState(S, z if self.normalize else None, position)
        if self.layout is None:
            self.layout = _layout_of(end)
        else:
            end.__dict__[LAYOUT] = self.layout
        return out, end


_remembered: dict[Signature, Repeated] = {}


def recall(signature: Signature | None) -> Repeated | None:
    """What an earlier call with this signature has left."""
    return None if signature is None else _remembered.get(signature)


def remember(
    signature: Signature | None,
    plan: Plan[AttentionSpec],
    inputs: AttentionInputs,
    returns_state: bool,
) -> Repeated | None:
    """What the call and later ones with its signature have in common; None if nothing."""
    if signature is None or plan.impl != "native" or not RepeatedAttention.suits(inputs):
        return None
    if len(_remembered) >= MOST:
        forget()
    found = Repeated(RepeatedAttention(inputs, plan.spec), plan.spec.normalize, returns_state)
    _remembered[signature] = found
    return found


def forget() -> None:
    """Forget all calls, because something that no signature holds has changed."""
    _remembered.clear()


def signature(
    options: tuple[Any, ...],
    masks: tuple[Tensor | None, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: LinearState | None,
) -> Signature | None:
    """All that a plain call depends on, except numbers; None for other calls.

    options: the operation's name and options.
    masks: key_mask and cu_seqlens, which plain calls do not have.
    """
    if (
        masks[0] is not None
        or masks[1] is not None
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()
    ):
        return None
    if not PLAIN_OPTIONS.issuperset(map(type, options)):
        return None
    parts = [options, torch.get_num_threads(), implementation_variable()]
    if not _add_layouts(parts, (query, key, value, log_decay)):
        return None
    if state is not None:
        layout = _layout_of(state)
        if layout is None:
            return None
        parts.append(layout)
    return tuple(parts)


def _add_layouts(parts: list[Any], tensors: tuple[Tensor | None, ...]) -> bool:
    """Add shape, strides and dtype of each tensor; False if one is not a plain one on the CPU."""
    for x in tensors:
        if x is None:
            parts.append(None)
            continue
        if (
            type(x) not in PLAIN_TENSORS
            or not x.is_cpu
            or x.layout is not STRIDED
            or x.is_neg()
            or x._is_zerotensor()
        ):
            return False
        parts.append((x.shape, x.stride(), x.dtype))
    return True


def _layout_of(state: LinearState) -> tuple[Any, ...] | None:
    """The layout of a state's tensors; None if they are not plain ones. It is noted on the state,
    which does not change.
    """
    if type(state) is not LinearState:
        return None
    noted: tuple[Any, ...] | None = state.__dict__.get(LAYOUT)
    if noted is None:
        parts: list[Any] = []
        if not _add_layouts(parts, (state.numerator, state.denominator, state.position)):
            return None
        noted = state.__dict__[LAYOUT] = tuple(parts)
    return noted
