"""Token mixers on images and video, channels first."""

from __future__ import annotations

from torch import Tensor, nn

from .padding import check_tensor


class ChannelFirst(nn.Module):
    """Runs a mixer over every position of ``[B, D, H, W]``, ``[B, D, T, H, W]`` or any ``[B, D, ...]``.

    Positions are read row by row (the last dimension runs fastest), as one sequence of tokens ``[B, T·H·W, D]``.

    Args:
        module: a mixer of the protocol in `cumulant.nn`, ``[B, N, D] -> [B, N, D']``.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """``x [B, D, ...]`` -> ``[B, D', ...]``; `key_mask` ``[B, ...]`` bool, True where there is something to see;
        `context` ``[B, S, D_c]`` and `context_mask` ``[B, S]`` are tokens, as the mixer takes them."""
        check_tensor(x, "[B, D, ...]")
        if x.dim() < 3:
            raise ValueError(f"x: expected [B, D, ...] with at least one dimension of positions, got {list(x.shape)}")
        shape = x.shape[2:]
        options = {"context": context, "context_mask": context_mask}
        given = {name: value for name, value in options.items() if value is not None}
        if key_mask is not None:
            check_tensor(key_mask, "[B, ...]", "key_mask")
            if key_mask.shape != (x.shape[0], *shape):
                raise ValueError(f"key_mask: expected [B, ...] = {[x.shape[0], *shape]}, got {list(key_mask.shape)}")
            given["key_mask"] = key_mask.flatten(1)
        y: Tensor = self.module(x.flatten(2).mT, **given)
        positions: Tensor = y.mT.unflatten(2, shape)
        return positions
