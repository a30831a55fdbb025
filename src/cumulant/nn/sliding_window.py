"""Sliding-window softmax attention: each token sees itself and the `window` - 1 tokens before it,
in O(T · window).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.dispatch import exports_to_onnx, plainly_called
from ..ops.state import KeyValueState
from .checks import check_count
from .padding import compact, restore
from .softmax import SoftmaxAttention, attend_softmax, attend_visible


class SlidingWindowAttention(SoftmaxAttention):
    """Softmax attention over the last `window` tokens. Its state holds the last ``window - 1`` keys
    and values.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rotary, rotary_base: as in `SoftmaxAttention`.
        window: tokens seen, itself included.
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
        self.window = window

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: KeyValueState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """``x [B, T, D]`` -> ``[B, T, D]``, with `return_state` also the state; see `cumulant.nn`
        for the protocol.
        """
        if (
            key_mask is None
            or x.dim() != 3
            or key_mask.shape != x.shape[:2]
            or key_mask.dtype != torch.bool
        ):
            return super().forward(
                x, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state, return_state=return_state
            )
        # Windows count tokens, not padding: the row is compacted, so that neighbours in it are
        # neighbours in the text.
        x, rows = compact(x, key_mask)
        result = super().forward(
            x, key_mask=rows.mask, cu_seqlens=cu_seqlens, state=state, return_state=return_state
        )
        return (
            (restore(result[0], rows), result[1])
            if isinstance(result, tuple)
            else restore(result, rows)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: int) -> Tensor:
        T, w = q.shape[2], self.window
        if exports_to_onnx():  # whose blocks would keep the length that they were exported with
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
        """Blocks of n <= window queries, each on the n + window - 1 keys that they can see."""
        (B, _H, T, _), w = q.shape, self.window
        n = max(1, min(w, T))
        blocks = -(-T // n)
        left, right = w - 1 - past, blocks * n - T
        seen = (
            torch.ones(B, k.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
        )
        q = F.pad(q, (0, 0, 0, right)).unflatten(2, (blocks, n))
        # F.pad with a negative left side drops keys older than any query's window
        place = torch.arange(blocks, device=q.device)[:, None] * n + torch.arange(
            n + w - 1, device=q.device
        )
        k, v = (_windows(F.pad(x, (0, 0, left, right)), place, n) for x in (k, v))
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
        """The last window - 1 tokens of each row, older slots first; the mask says which slots are
        filled.
        """
        keep = min(self.window - 1, k.shape[2])
        if mask is None:
            # copies: views would keep the whole sequence alive
            k, v = (x[:, :, x.shape[2] - keep :].clone() for x in (k, v))
            return KeyValueState(k, v, None, position)
        # a stable sort by the mask moves what is masked to the front
        order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, mask.shape[1] - keep :]
        index = order[:, None, :, None]
        key = k.gather(2, index.expand(-1, k.shape[1], -1, k.shape[3]))
        value = v.gather(2, index.expand(-1, v.shape[1], -1, v.shape[3]))
        return KeyValueState(key, value, mask.gather(1, order), position)


def _windows(x: Tensor, place: Tensor, step: int) -> Tensor:
    """``x [B, G, S, K]`` at every window's places ``[windows, size]``, which begin every `step`:
    ``[B, G, windows, size, K]``."""
    if torch.compiler.is_compiling() or plainly_called():
        return x.unfold(2, place.shape[1], step).mT
    return x[:, :, place]  # gradients of unfold cannot be mapped
