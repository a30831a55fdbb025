"""Checks of modules' inputs and states.

Errors name the argument, the expected and the received value, and a fix.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn

from ..ops.checks import FLOATS, check_key_mask, check_position
from ..ops.state import KeyValueState, State

_OTHER_MODULE = "the state comes from another module, or from one with other options"


def check_count(name: str, count: object, least: int = 1) -> None:
    """The number of channels, heads or tokens is an integer of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, Integral):
        got = repr(count) if isinstance(count, (bool, int, float, str)) else type(count).__name__
        raise TypeError(f"{name}: expected an integer of at least {least}, got {got}")
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")


def check_counts(**counts: object) -> None:
    """Each of these numbers is None or an integer of at least 1."""
    for name, count in counts.items():
        if count is not None:
            check_count(name, count)


def count_kv_heads(num_kv_heads: int | None, num_heads: int) -> int:
    """The number of key/value heads, by default as many as query heads; it must divide those."""
    groups = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % groups:
        raise ValueError(
            f"num_kv_heads: the {groups} key/value heads must divide the {num_heads} query heads"
        )
    return groups


def size_of_head(name: str, size: int | None, dim: int, num_heads: int) -> int:
    """The channels of a head, by default an equal share of the model dim. name: the option's."""
    if size is not None:
        return size
    if dim % num_heads:
        raise ValueError(f"num_heads: {num_heads} must divide dim={dim}, or {name} must be given")
    return dim // num_heads


def check_probability(name: str, p: float) -> None:
    """A dropout probability is at least 0 and below 1."""
    if not 0 <= p < 1:
        raise ValueError(f"{name}: expected a probability below 1, got {p}")


def check_tensor(x: object, letters: str, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {letters}, got {type(x).__name__}")


def check_floats(x: object, letters: str, name: str = "x") -> None:
    """x is a tensor in one of the dtypes that modules work in."""
    check_tensor(x, letters, name)
    dtype = x.dtype  # type: ignore[attr-defined]
    if dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected {letters} in fp16, bf16, fp32 or fp64, got {dtype};"
            " embed or convert it first"
        )


def check_dtype(x: Tensor, layer: nn.Module, letters: str, name: str = "x") -> None:
    """x has a dtype that `layer` can multiply."""
    check_floats(x, letters, name)
    # quantised weights have other types, and their layers convert the input
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or weight.dtype == x.dtype:
        return
    if not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}: expected {weight.dtype}, as the module's weights, got {x.dtype}; convert with"
            f" {name}.to({weight.dtype}), or run under torch.autocast"
        )


def check_features(
    x: Tensor, layer: nn.Module, dim: int, letters: str = "[B, T, D]", name: str = "x"
) -> None:
    """x has the shape in `letters` and a dtype that `layer`, its first reader, can multiply."""
    check_tensor(x, letters, name)
    if x.dim() == 0 or x.shape[-1] != dim or ("..." not in letters and x.dim() != 3):
        raise ValueError(
            f"{name}: expected {letters} with {letters[-2]}={dim}, got {list(x.shape)}"
        )
    check_dtype(x, layer, letters, name)


def check_positions(
    position: object, letters: str = "[T] or [B, T]", name: str = "position"
) -> None:
    """Positions are real numbers, mostly integers."""
    check_tensor(position, letters, name)
    dtype = position.dtype  # type: ignore[attr-defined]
    if dtype == torch.bool or dtype.is_complex:
        mask = dtype == torch.bool
        hint = "; positions of a mask's tokens are mask.cumsum(-1) - 1" if mask else ""
        raise TypeError(f"{name}: expected {letters} of numbers, got {dtype}{hint}")


def check_input(
    x: Tensor,
    layer: nn.Module,
    dim: int,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    has_state: bool,
) -> None:
    """The arguments that every mixer takes. layer: the first linear layer that reads x."""
    check_features(x, layer, dim)
    check_key_mask(key_mask, x.shape[0], x.shape[1], x.device)
    if cu_seqlens is None:
        return
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: packed sequences need B = 1, got x {list(x.shape)}")
    if key_mask is not None or has_state:
        raise ValueError(
            "cu_seqlens: cannot be combined with key_mask, state or return_state in a module; "
            "leave masked tokens out of the packed row, or pass a padded batch"
        )


def check_state(state: State | None, kind: type[State], x: Tensor) -> None:
    """The state has this mixer's class, the device of x, and as many rows as the batch."""
    if state is None:
        return
    if not isinstance(state, kind):
        raise TypeError(
            f"state: expected a {kind.__name__} from return_state=True, got {type(state).__name__}"
        )
    position, rows = getattr(state, "position", None), x.shape[0]
    found = position.shape[0] if isinstance(position, Tensor) and position.dim() == 1 else rows
    if found != rows:
        raise ValueError(
            f"state: expected {rows} rows, as x has, got {found}; choose rows with"
            " state.select(index)"
        )
    check_position(position, rows, x.device)


def check_tensor_like(
    tensor: object, expected: str, letters: str, shape: tuple[int, ...], x: Tensor, reason: str = ""
) -> None:
    """A tensor has this shape and the device of x. expected: the beginning of the message."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        got = _shape_or_type(tensor)
        raise ValueError(f"{expected} {letters} = {list(shape)}, got {got}{reason}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{expected} in fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    if tensor.device != x.device:
        raise TypeError(f"{expected} on {x.device}, got {tensor.device}; move it with .to(device)")


def check_state_tensor(
    tensor: object, name: str, letters: str, shape: tuple[int, ...] | None, x: Tensor
) -> None:
    """A tensor of a state has this shape and the device of x. None for a shape: there is none."""
    if shape is None:
        if tensor is not None:
            got = _shape_or_type(tensor)
            raise ValueError(f"state: expected no {name} here, got {got}; {_OTHER_MODULE}")
        return
    check_tensor_like(tensor, f"state: expected {name}", letters, shape, x, f"; {_OTHER_MODULE}")


def check_key_value_state(
    state: KeyValueState | None, groups: int, key_dim: int, value_dim: int, x: Tensor
) -> None:
    """A state's keys, values and mask fit each other and x, for any number of tokens."""
    if state is None:
        return
    rows, key = x.shape[0], state.key
    if not isinstance(key, Tensor) or key.dim() != 4:
        raise ValueError(
            f"state: expected key [B, G, S, K], got {_shape_or_type(key)}; {_OTHER_MODULE}"
        )
    slots = key.shape[2]
    check_state_tensor(key, "key", "[B, G, S, K]", (rows, groups, slots, key_dim), x)
    check_state_tensor(state.value, "value", "[B, G, S, V]", (rows, groups, slots, value_dim), x)
    check_key_mask(state.mask, rows, slots, x.device, name="state.mask")


def _shape_or_type(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
