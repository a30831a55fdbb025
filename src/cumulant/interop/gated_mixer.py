"""What the gated layers of other packages share: masks, packing, states, and their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.checks import check_input, check_state, check_state_tensor
from ..nn.kernel_attention import KernelAttentionState
from ..nn.padding import (
    LocalRows,
    compact_rows,
    packed_positions,
    restore_rows,
    zero_after_packed,
)
from ..nn.short_convolution import ShortConvolution
from ..ops.state import LinearState
from .weights import Weights

Activation = str | Callable[[Tensor], Tensor]


def squared_relu(x: Tensor) -> Tensor:
    """``relu(x)²``."""
    return F.relu(x).square()


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by the approximation with tanh."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": squared_relu,
    "gelu": tanh_gelu,
}


def find_activation(name: str, activation: Activation) -> Callable[[Tensor], Tensor]:
    """An elementwise function by its name, or itself. name: the option's."""
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: expected one of {', '.join(ACTIVATIONS)} or a function, got {activation!r}"
        )
    return ACTIVATIONS[activation]


class SiluConvolution(ShortConvolution):
    """``silu(Σ_j w_j ⊙ x_{t-j} + b)``; see `ShortConvolution`."""

    def __init__(self, dim: int, size: int, *, bias: bool):
        super().__init__(dim, size)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, *x: Tensor, **rows: Tensor | None) -> tuple[Tensor, ...]:
        """As `ShortConvolution.forward`."""
        *mixed, tail = super().forward(*x, **rows)
        if self.bias is not None:
            biases = self.bias.to(mixed[0].dtype).split([part.shape[-1] for part in mixed])
            mixed = [part + bias for part, bias in zip(mixed, biases, strict=True)]
        return *map(F.silu, mixed), tail


def choose_options(
    source: nn.Module | Mapping[str, Tensor],
    given: dict[str, Any],
    read: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """The options that were given with a state dict, or that `read` finds in a layer."""
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(source, nn.Module):
        if options:
            raise ValueError(
                f"{next(iter(options))}: read off the layer; give it only with a state dict"
            )
        options = {name: value for name, value in read(source).items() if value is not None}
    return options


def read_taps(weights: Weights, name: str) -> Tensor:
    """Pop the weight ``[E, 1, size]`` of a depthwise `Conv1d`, as ``[size, E]``, newest first."""
    weight = weights.pop_weight(name)
    if weight.dim() != 3 or weight.shape[1] != 1:
        raise ValueError(
            f"source: the weight {name} has shape {list(weight.shape)}, expected [E, 1, size]"
        )
    return weight[:, 0].T.flip(0)


class GatedNorm(nn.Module):
    """``RMSNorm(y) ⊙ a(gate)``, or with `gate_first` ``RMSNorm(y ⊙ a(gate))``, in fp32 inside.

    Args:
        size: channels that are normalised together.
        groups: normalised parts that have weights of their own; further parts share them.
        eps: added to the mean square.
        affine: there are weights ``[groups · size]``.
        gate_first: multiply by the gate before the norm.
        activation: the function a, a name or itself.
    """

    def __init__(
        self,
        size: int,
        groups: int = 1,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        gate_first: bool = False,
        activation: Activation = "silu",
    ):
        super().__init__()
        self.size, self.eps, self.gate_first = size, eps, gate_first
        self.activation = find_activation("gate_fn", activation)
        self.weight = nn.Parameter(torch.ones(groups * size)) if affine else None

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, gate_first={self.gate_first}"

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y and gate ``[..., E]`` -> ``[..., E]``."""
        dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
        y, gate = y.to(wide), self.activation(gate.to(wide))
        y = y * gate if self.gate_first else y
        y = F.rms_norm(y.unflatten(-1, (-1, self.size)), (self.size,), None, self.eps)
        if self.weight is not None:
            y = y * self.weight.to(wide).view(-1, self.size)
        y = y.flatten(-2)
        return (y if self.gate_first else y * gate).to(dtype)


class GatedMixer(nn.Module):
    """A causal mixer with the protocol of `cumulant.nn`. Subclasses compute `mix`.

    Its state is a `KernelAttentionState`, without `shift`.
    """

    conv: SiluConvolution | None
    first_proj: str  # the name of the first linear layer

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def mix(
        self, x: Tensor, local: dict[str, Tensor | None], rows: dict[str, Any]
    ) -> tuple[Tensor, LinearState | None, Tensor | None]:
        """Outputs ``[B, T, D]``, the sums with `return_state`, and the convolution's new tail.

        local: keyword arguments of the convolution. rows: those of the operation, key_mask,
            cu_seqlens, state and return_state.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KernelAttentionState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, KernelAttentionState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`."""
        stateful = state is not None or return_state
        first = getattr(self, self.first_proj)
        check_input(x, first, self.dim, key_mask, cu_seqlens, stateful)
        check_state(state, KernelAttentionState, x)
        if state is not None:
            tail = None if self.conv is None else (x.shape[0], self.conv.size - 1, self.conv.dim)
            check_state_tensor(state.shift, "shift", "", None, x)
            check_state_tensor(state.conv, "conv", "[B, size - 1, E]", tail, x)
        rows, local = None, LocalRows(None, None)
        if key_mask is not None:
            x, rows = compact_rows(x, key_mask)
            local = LocalRows(x.shape[1] - rows.tokens, None)
        if cu_seqlens is not None:
            x = zero_after_packed(x, cu_seqlens)
            local = LocalRows(None, packed_positions(x.shape[1], cu_seqlens))
        y, sums, conv = self.mix(
            x,
            {"tail": None if state is None else state.conv, **local._asdict()},
            {
                "key_mask": None if rows is None else rows.mask,
                "cu_seqlens": cu_seqlens,
                "state": None if state is None else state.sums,
                "return_state": return_state,
            },
        )
        y = restore_rows(y, rows)
        if cu_seqlens is not None:
            y = zero_after_packed(y, cu_seqlens)
        return y if sums is None else (y, KernelAttentionState(sums, None, conv))
