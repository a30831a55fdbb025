"""Mamba-2's state space duality (SSD): its sums are those of linear attention with decays."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import FLOATS, check_at_most_zero
from ..ops.linear import linear_attention
from ..ops.state import LinearState


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """The core of Mamba-2, in the layout of its package: ``[batch, T, heads, channels]``.

    ``S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_tᵀ`` and ``y_t = S_tᵀ C_t + D x_t`` for each head. This
    is `cumulant.linear_attention` without feature map and normaliser: C are the queries, B the
    keys, ``dt x`` the values, and ``dt A`` the log decays.

    Heads of a group share B and C, but have values and decays of their own. So B and C are expanded
    to all heads.

    Args:
        x: ``[batch, T, H, P]``; fp16, bf16, fp32 or fp64. Sums are taken in fp32 (fp64 for fp64).
        dt: ``[batch, T, H]``, at least 0: after softplus and bias.
        A: ``[H]``, at most 0: the layer's ``-exp(A_log)``.
        B: ``[batch, T, G, N]`` in x's dtype; G divides H, and head h uses group ``h // (H / G)``.
        C: ``[batch, T, G, N]`` in x's dtype.
        D: ``[H]`` or ``[H, P]``, or None for no skip.
        key_mask: ``[batch, T]`` bool, True at tokens. A masked token changes no state.
        cu_seqlens: ``[sequences + 1]`` offsets of packed sequences, as in
            `cumulant.linear_attention`.
        state: sums over earlier tokens, from `return_state` or `from_ssm_state`.
        return_state: return ``(y, state)``; `to_ssm_state` has the package's layout.
        impl: as in `cumulant.linear_attention`.

    Returns:
        ``[batch, T, H, P]`` in x's dtype.

    Raises:
        ValueError, TypeError: a message with the argument, the expected and the received value.

    Source: Dao and Gu 2024, "Transformers are SSMs", sections 2, 6 and 7.
    """
    _check(x, dt, A, B, C, D)
    heads, wide = x.shape[2], torch.promote_types(x.dtype, torch.float32)
    counts = None if key_mask is None else key_mask[..., None]
    if cu_seqlens is not None:
        counts = (torch.arange(x.shape[1], device=x.device) < cu_seqlens[-1])[None, :, None]
    if counts is not None:
        # masked numbers must not reach any gradient
        x, dt = x.masked_fill(~counts[..., None], 0), dt.masked_fill(~counts, 0)
    dt = dt.to(wide)
    log_decay = (dt * A.to(wide)).mT
    hint = "a layer has dt = softplus(dt + dt_bias) and A = -A_log.exp()"
    check_at_most_zero("dt, A", log_decay, "products dt A", hint)
    attended = linear_attention(
        _expand_groups(C, heads),
        _expand_groups(B, heads),
        (x * dt[..., None]).to(x.dtype).transpose(1, 2),
        "identity",
        is_causal=True,
        normalize=False,
        log_decay=log_decay,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        state=state,
        return_state=return_state,
        impl=impl,
    )
    y, end = attended if isinstance(attended, tuple) else (attended, None)
    y = y.transpose(1, 2)
    if D is not None:
        y = (y + x * D.to(wide).view(heads, -1)).to(x.dtype)
    return y if end is None else (y, end)


def from_ssm_state(ssm_state: Tensor, position: Tensor | None = None) -> LinearState:
    """The state of `ssd` from Mamba-2's ``[batch, H, P, N]``, a copy in fp32 (fp64 for fp64).

    position: ``[batch]`` int64, the tokens so far; by default zeros. No output depends on it.
    """
    if not isinstance(ssm_state, Tensor) or ssm_state.dim() != 4 or ssm_state.dtype not in FLOATS:
        raise ValueError(f"ssm_state: expected floats [batch, H, P, N], got {_show(ssm_state)}")
    wide = torch.promote_types(ssm_state.dtype, torch.float32)
    sums = ssm_state.mT.to(wide).clone(memory_format=torch.contiguous_format)
    if position is None:
        position = torch.zeros(len(sums), dtype=torch.int64, device=sums.device)
    return LinearState(sums, None, position)


def to_ssm_state(state: LinearState) -> Tensor:
    """Mamba-2's ``[batch, H, P, N]`` from the state of `ssd`, a copy."""
    if not isinstance(state, LinearState):
        raise TypeError(f"state: expected a LinearState, got {type(state).__name__}")
    return state.numerator.mT.clone(memory_format=torch.contiguous_format)


def _expand_groups(x: Tensor, heads: int) -> Tensor:
    """``[batch, T, G, N]`` -> ``[batch, H, T, N]``: a view where there is one group."""
    x = x.transpose(1, 2)
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def _show(x: object) -> str:
    return f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in FLOATS:
        raise ValueError(f"x: expected floats [batch, T, H, P], got {_show(x)}")
    batch, length, heads, channels = x.shape
    for name, tensor, letters, shapes in (
        ("dt", dt, "[batch, T, H]", [[batch, length, heads]]),
        ("A", A, "[H]", [[heads]]),
        ("D", D, "[H] or [H, P]", [[heads], [heads, channels]]),
    ):
        if name == "D" and tensor is None:
            continue
        if not isinstance(tensor, Tensor) or list(tensor.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected {letters} = {expected}, got {_show(tensor)}")
    for name, tensor in (("B", B), ("C", C)):
        fits = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.dtype == x.dtype
        if fits:
            groups = tensor.shape[2]
            fits = list(tensor.shape[:2]) == [batch, length] and groups > 0 == heads % groups
        if not fits:
            raise ValueError(
                f"{name}: expected [batch, T, G, N] = [{batch}, {length}, G, N] in {x.dtype} as x,"
                f" where G divides the {heads} heads, got {_show(tensor)}"
            )
    if B.shape != C.shape:
        raise ValueError(f"C: expected {list(B.shape)} as B, got {_show(C)}")
