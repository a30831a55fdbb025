"""Token mixers on images and video, channels first."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from .checks import check_floats, check_tensor


class ChannelFirst(nn.Module):
    """Runs a mixer over all positions of images, video or any other ``[B, D, ...]``.

    The positions of ``[B, D, H, W]`` or ``[B, D, T, H, W]`` are read row by row, the last dimension
    fastest, as one sequence of tokens ``[B, T·H·W, D]``.

    Args:
        module: a mixer of the protocol in `cumulant.nn`, ``[B, N, D] -> [B, N, D']``.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module: expected a mixer, a torch.nn.Module, got {type(module).__name__}"
            )
        self.module = module

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """``x [B, D, ...]`` -> ``[B, D', ...]``.

        ``key_mask [B, ...]`` is True at the positions that are attended to.
        ``context [B, S, D_c]`` and ``context_mask [B, S]`` are passed on to the mixer.
        """
        self._check_input(x)
        shape = x.shape[2:]
        options = {"key_mask": key_mask, "context": context, "context_mask": context_mask}
        passed = {name: value for name, value in options.items() if value is not None}
        self._check_options(passed)
        if key_mask is not None:
            check_tensor(key_mask, "[B, ...]", "key_mask")
            if key_mask.shape != (x.shape[0], *shape):
                raise ValueError(
                    f"key_mask: expected [B, ...] = {[x.shape[0], *shape]}, got"
                    f" {list(key_mask.shape)}"
                )
            if key_mask.dtype != torch.bool:
                raise TypeError(
                    "key_mask: expected a boolean tensor [B, ...], True = attend, got"
                    f" {key_mask.dtype}; try key_mask.bool()"
                )
            passed["key_mask"] = key_mask.flatten(1)
        y: Tensor = self.module(x.flatten(2).mT, **passed)
        positions: Tensor = y.mT.unflatten(2, shape)
        return positions

    def _check_input(self, x: Tensor) -> None:
        """Checks x before the mixer does, whose messages are about tokens."""
        check_floats(x, "[B, D, ...]")
        if x.dim() < 3:
            raise ValueError(
                "x: expected [B, D, ...] with at least one dimension of positions, got"
                f" {list(x.shape)}"
            )
        dim = getattr(self.module, "dim", None)
        if isinstance(dim, int) and x.shape[1] != dim:
            hint = "; channels come second, try x.movedim(-1, 1)" if x.shape[-1] == dim else ""
            raise ValueError(f"x: expected [B, D, ...] with D={dim}, got {list(x.shape)}{hint}")

    def _check_options(self, passed: dict[str, Tensor]) -> None:
        """The mixer accepts these arguments."""
        parameters = inspect.signature(self.module.forward).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for name in passed:
            if name not in parameters:
                raise TypeError(f"{name}: {type(self.module).__name__} takes none; leave it out")
