"""Sliding-window softmax attention, in O(T · window)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.dispatch import exports_to_onnx, no_transform_active
from ..ops.state import KeyValueState
from .checks import check_count
from .padding import compact_rows, restore_rows
from .softmax import SoftmaxAttention, attend_softmax, attend_visible
from .step import known_to_programs


@known_to_programs
class SlidingWindowAttention(SoftmaxAttention):
    """Softmax attention in which each token sees itself and the ``window - 1`` tokens before it.

    Its state holds the last ``window - 1`` keys and values.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rotary, rotary_base: as in `SoftmaxAttention`.
        window: tokens that a token sees, itself included.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        window: int = 64,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: bool = False,
        rotary_base: float = 10000.0,
    ):
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary=rotary,
            rotary_base=rotary_base,
        )
        check_count("window", window)
        self.window: int = window

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KeyValueState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, and the state if asked for; see `cumulant.nn`."""
        if (
            key_mask is None
            or x.dim() != 3
            or key_mask.shape != x.shape[:2]
            or key_mask.dtype != torch.bool
        ):
            return super().forward(
                x, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state, return_state=return_state
            )
        # Windows count tokens, not padding. So padding is moved out from between them.
        x, rows = compact_rows(x, key_mask)
        result = super().forward(
            x, key_mask=rows.mask, cu_seqlens=cu_seqlens, state=state, return_state=return_state
        )
        return (
            (restore_rows(result[0], rows), result[1])
            if isinstance(result, tuple)
            else restore_rows(result, rows)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: int) -> Tensor:
        T, w = q.shape[2], self.window
        if exports_to_onnx():  # blocks would fix the length in the exported graph
            ahead = (
                torch.arange(T, device=q.device)[:, None]
                + past
                - torch.arange(k.shape[2], device=q.device)
            )
            visible = (ahead >= 0) & (ahead < w)
            return attend_visible(
                q, k, v, visible if mask is None else visible & mask[:, None, None]
            )
        if T == 0:
            return q
        if mask is None and T == 1:
            return attend_softmax(q, k[:, :, -w:], v[:, :, -w:])
        if mask is None and past == 0 and w >= T:
            return attend_softmax(q, k, v, is_causal=True)
        return self._attend_blocks(q, k, v, mask, past)

    def _attend_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: int
    ) -> Tensor:
        """Blocks of n <= window queries attend to the n + window - 1 keys that they can see."""
        (B, _H, T, _), w = q.shape, self.window
        n = max(1, min(w, T))
        blocks = -(-T // n)
        left, right = w - 1 - past, blocks * n - T
        seen = (
            torch.ones(B, k.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
        )
        q = F.pad(q, (0, 0, 0, right)).unflatten(2, (blocks, n))
        # F.pad with a negative left side drops keys that are too old for every query
        index = torch.arange(blocks, device=q.device)[:, None] * n + torch.arange(
            n + w - 1, device=q.device
        )
        k, v = (_gather_windows(F.pad(x, (0, 0, left, right)), index, n) for x in (k, v))
        seen = F.pad(seen, (left, right)).unfold(1, n + w - 1, n)
        ahead = torch.arange(n + w - 1, device=q.device) - torch.arange(n, device=q.device)[:, None]
        visible = ((ahead >= 0) & (ahead < w)) & seen[:, :, None, :]
        out: Tensor = attend_visible(
            q.transpose(1, 2).flatten(0, 1),
            k.transpose(1, 2).flatten(0, 1),
            v.transpose(1, 2).flatten(0, 1),
            visible.flatten(0, 1)[:, None],
        )
        out = out.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]
        return out

    def remember(
        self, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor
    ) -> KeyValueState:
        """The last window - 1 tokens of each row in their order. The mask is True at tokens."""
        keep = min(self.window - 1, k.shape[2])
        if mask is None:
            # copies, as views would keep the whole sequence in memory
            k, v = (x[:, :, x.shape[2] - keep :].clone() for x in (k, v))
            return KeyValueState(k, v, None, position)
        # a stable sort by the mask moves masked tokens to the front
        order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, mask.shape[1] - keep :]
        index = order[:, None, :, None]
        key = k.gather(2, index.expand(-1, k.shape[1], -1, k.shape[3]))
        value = v.gather(2, index.expand(-1, v.shape[1], -1, v.shape[3]))
        return KeyValueState(key, value, mask.gather(1, order), position)


def _gather_windows(x: Tensor, index: Tensor, step: int) -> Tensor:
    """``x [B, G, S, K]`` -> ``[B, G, windows, size, K]``.

    ``index [windows, size]`` holds each window's tokens. Windows start every `step` tokens.
    """
    if torch.compiler.is_compiling() or no_transform_active():
        return x.unfold(2, index.shape[1], step).mT
    return x[:, :, index]  # torch.func cannot map the gradients of unfold
