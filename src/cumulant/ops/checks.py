"""Input checks shared by the operations.

An error names the argument, the expected shape in letters, the received shape, and a fix.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.transforms import readable
from .state import LinearState, State

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes(NamedTuple):
    """The sizes of one call, by the dimension letters of DESIGN.md."""

    B: int
    H: int
    G: int
    T: int
    S: int
    K: int
    V: int


def _show_shape(x: object) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def _shape_of(part: object) -> tuple[int, ...] | None:
    return tuple(part.shape) if isinstance(part, Tensor) else None


def _check_heads(name: str, x: object, letters: str, first: str, query: Tensor) -> None:
    """Check that x is a tensor of four dims, with the dtype and device of the first argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {letters}, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(
            f"{name}: expected {letters}, got {_show_shape(x)}; heads are the second dimension,"
            " as in SDPA"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; use {name}.to_dense()")
    if x.dtype != query.dtype or x.device != query.device:
        raise TypeError(
            f"{name}: expected {first}'s dtype and device, {query.dtype} on {query.device}, "
            f"got {x.dtype} on {x.device}; convert with {name}.to({first})"
        )


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: Tensor | None = None,
    names: tuple[str, str] = ("query", "key"),
) -> Sizes:
    """Check shapes, dtypes and devices of query, key, value and masks.

    names: what messages call query and key.
    """
    first, second = names
    layout = (
        (first, query, "[B, H, T, K]"),
        (second, key, "[B, G, S, K]"),
        ("value", value, "[B, G, S, V]"),
    )
    for name, x, letters in layout:
        _check_heads(name, x, letters, first, query)
    B, H, T, K = query.shape
    G, S, V = key.shape[1], key.shape[2], value.shape[3]
    if key.shape[0] != B or key.shape[3] != K:
        raise ValueError(
            f"{second}: expected [B, G, S, K] with B={B}, K={K} as in {first}, got"
            f" {_show_shape(key)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected [B, G, S, V] = [{B}, {G}, {S}, V] as in {second}, got"
            f" {_show_shape(value)}"
        )
    if G == 0 or H % G:
        raise ValueError(
            f"{second}: the {G} key/value heads (G) must divide the {H} query heads (H)"
        )
    if K == 0:
        raise ValueError(f"{first}: expected [B, H, T, K] with K >= 1, got {_show_shape(query)}")
    if is_causal and T != S:
        raise ValueError(
            f"key: causal attention needs as many keys as queries (S = T), got T={T}, S={S}; "
            "pass earlier keys as state=..., or is_causal=False for cross attention"
        )
    check_key_mask(key_mask, B, S, query.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T, S, query.device)
    sizes = Sizes(B, H, G, T, S, K, V)
    if log_decay is not None:
        masks = key_mask, cu_seqlens
        _check_log_decay(log_decay, sizes, query.device, is_causal, masks)
    return sizes


def check_key_mask(
    key_mask: Tensor | None, B: int, S: int, device: torch.device, *, name: str = "key_mask"
) -> None:
    """Check that a mask is None or ``[B, S]`` bool on `device`; messages call it `name`."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(
            f"{name}: expected a boolean tensor [B, S], True = attend, got {got}; try {name}.bool()"
        )
    if key_mask.shape != (B, S):
        raise ValueError(f"{name}: expected [B, S] = [{B}, {S}], got {_show_shape(key_mask)}")
    if key_mask.device != device:
        raise ValueError(f"{name}: expected on {device} like query, got {key_mask.device}")


def check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int, S: int, device: torch.device) -> None:
    """Check offsets of packed sequences; their values only where they can be read."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor [N + 1], got {got}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens: expected [N + 1] with N >= 1 sequences, got {_show_shape(cu_seqlens)}"
        )
    if B != 1 or T != S:
        raise ValueError(
            f"cu_seqlens: packed sequences need B = 1 and as many keys as queries, got B={B},"
            f" T={T}, S={S}; put the sequences end to end along T"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device} like query, got {cu_seqlens.device}")
    if not readable(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > T or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens: expected offsets rising from 0 to at most T={T}, got {bounds[:8]}"
        )


def check_position(position: object, rows: int, device: torch.device) -> None:
    """Check the dtype, shape and device of a state's token counts, but not their values."""
    letters = f"state: expected position [B] int64 = [{rows}] on {device}"
    if not isinstance(position, Tensor):
        raise TypeError(
            f"{letters}, got {type(position).__name__}; pass a state from return_state=True as"
            " it is"
        )
    if position.dtype != torch.int64:
        raise TypeError(
            f"{letters}, got {list(position.shape)} {_dtype_name(position)}; convert it with"
            " position.long()"
        )
    if position.dim() != 1 or position.shape[0] != rows:
        raise ValueError(
            f"{letters}, got {list(position.shape)}; choose rows with state.select(index)"
        )
    if position.device != device:
        raise TypeError(f"{letters}, got one on {position.device}; move it with state.to(device)")


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def check_linear_state(
    state: LinearState | None, N: int, sizes: Sizes, F: int, normalize: bool, query: Tensor
) -> None:
    """Check that a state fits this call: N rows or packed sequences, and F features."""
    if state is None:
        return
    if not isinstance(state, LinearState):
        raise TypeError(
            f"state: expected a LinearState from return_state=True, got {type(state).__name__}"
        )
    expected = (N, sizes.G, F, sizes.V)
    if _shape_of(state.numerator) != expected:
        raise ValueError(
            f"state: expected numerator [B, G, F, V] = {list(expected)}, got"
            f" {_show_shape(state.numerator)}; the state comes from another batch, head layout,"
            " order or feature map"
        )
    if normalize and _shape_of(state.denominator) != expected[:3]:
        got = (
            "None (normalize=False)"
            if state.denominator is None
            else _show_shape(state.denominator)
        )
        raise ValueError(f"state: expected denominator [B, G, F] = {list(expected[:3])}, got {got}")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if state.numerator.dtype != dtype or state.numerator.device != query.device:
        raise TypeError(
            f"state: expected {dtype} on {query.device}, got {state.numerator.dtype} on"
            f" {state.numerator.device}; move it with state.to(device)"
        )
    if (
        normalize
        and state.denominator is not None
        and not _share_dtype_and_device(state.denominator, state.numerator)
    ):
        got = f"{state.denominator.dtype} on {state.denominator.device}"
        raise TypeError(f"state: expected denominator in {dtype} on {query.device}, got {got}")
    check_position(state.position, N, query.device)


def _share_dtype_and_device(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.device == y.device


ACTIVATIONS = ("relu2", "laplace")


def _check_log_decay(
    log_decay: Tensor,
    sizes: Sizes,
    device: torch.device,
    is_causal: bool,
    masks: tuple[Tensor | None, Tensor | None],
) -> None:
    """Check shape, dtype and device of log decays, and the sign of those of tokens that count.

    masks: key_mask and cu_seqlens, which say which tokens count.
    """
    shape = (sizes.B, sizes.G, sizes.S)
    if not isinstance(log_decay, Tensor):
        raise TypeError(
            f"log_decay: expected a tensor [B, G, S] = {list(shape)}, got"
            f" {_show_shape(log_decay)};"
            " a fixed decay for each head is decay.log().view(1, G, 1).expand(B, G, S)"
        )
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"log_decay: expected fp32 or fp64, got {log_decay.dtype}; sums of many small decays"
            " need the digits, so take logarithms of fp32 numbers, as in logsigmoid(x.float())"
        )
    if log_decay.device != device:
        raise TypeError(
            f"log_decay: expected on {device} like query, got {log_decay.device}; use"
            f" log_decay.to({str(device)!r})"
        )
    if log_decay.layout != torch.strided:
        raise TypeError(
            f"log_decay: expected a dense tensor, got {log_decay.layout}; use log_decay.to_dense()"
        )
    if tuple(log_decay.shape) != shape:
        swapped = tuple(log_decay.mT.shape) if log_decay.dim() == 3 else None
        raise ValueError(
            f"log_decay: expected [B, G, S] = {list(shape)}, one for each key/value head and token,"
            f" got {_show_shape(log_decay)}"
            f"{'; use log_decay.mT' if swapped == shape else ''}"
        )
    if not is_causal:
        raise ValueError(
            "log_decay: decays follow time, so they need is_causal=True; without it, tokens have"
            " no order"
        )
    check_signs(log_decay, *masks)


def check_signs(
    log_decay: Tensor, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> None:
    """Check the sign of log decays ``[B, G, S]`` of tokens that count."""
    hint = "use logsigmoid(x), or decay.log() of decays between 0 and 1"
    check_at_most_zero("log_decay", log_decay, "logarithms of decays", hint, key_mask, cu_seqlens)


def check_at_most_zero(
    name: str,
    x: Tensor,
    what: str,
    hint: str,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Check the sign of numbers ``[..., S]``, where they can be read and their token counts."""
    if not readable(x, key_mask, cu_seqlens):
        return
    x = x.detach()  # a check saves nothing for a backward pass: checkpoints count what is saved
    if key_mask is not None:
        x = x.masked_fill(~key_mask[:, None], 0)
    if cu_seqlens is not None:
        x = x[..., : int(cu_seqlens[-1])]
    if x.numel() and not x.max().item() <= 0:  # of NaN, too
        found = "NaN" if bool(x.isnan().any()) else f"{x.max().item():g}"
        raise ValueError(f"{name}: expected {what}, at most 0, got {found}; {hint}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )


def check_group_size(group_size: int) -> None:
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"group_size: expected an integer of at least 1 token, got {group_size!r}")


def check_dropout(dropout_p: float) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability below 1, got {dropout_p}")


def check_bias(
    bias: Tensor | None,
    shapes: tuple[tuple[int, ...], ...],
    letters: str,
    query: Tensor,
    *,
    static: bool = False,
) -> None:
    """Check a bias on scores: a floating dtype, query's device, and one of `shapes`.

    While compiling, only `static` shapes are compared: comparing others would fix the length of
    the compiled graph.
    """
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.device != query.device:
        got = f"{bias.dtype} on {bias.device}" if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias: expected a floating tensor {letters} on {query.device}, got {got}")
    if (static or not torch.compiler.is_compiling()) and tuple(bias.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"bias: expected {letters} = {expected}, got {_show_shape(bias)}")


def check_state_tensors(
    state: State | None,
    kind: type[State],
    expected: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    query: Tensor,
) -> None:
    """Check that a state is a `kind` whose tensors have the expected shapes, dtype and device.

    expected: the shape of each tensor by its name, rows first. dtype: None allows any.
    """
    if state is None:
        return
    if not isinstance(state, kind):
        raise TypeError(
            f"state: expected a {kind.__name__} from return_state=True, got {type(state).__name__}"
        )
    for name, shape in expected.items():
        part = getattr(state, name)
        if _shape_of(part) != shape:
            raise ValueError(
                f"state: expected {name} {list(shape)}, got {_show_shape(part)}; the state comes"
                " from another batch, head layout or group size"
            )
        if (dtype is not None and part.dtype != dtype) or part.device != query.device:
            raise TypeError(
                f"state: expected {dtype or part.dtype} on {query.device}, got {part.dtype} on"
                f" {part.device}; move it with state.to(device)"
            )
    check_position(state.position, next(iter(expected.values()))[0], query.device)  # type: ignore[attr-defined]
