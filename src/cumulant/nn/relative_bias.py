"""T5's relative position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.dispatch import plainly_called
from .checks import check_count, check_counts, check_places


class T5RelativePositionBias(nn.Module):
    """A learned number for each bucket of distances, added to attention scores.

    The first half of the buckets holds one distance each, the second half ranges that grow
    logarithmically up to `max_distance`; all farther ones share the last. Without `is_causal` half
    of the buckets are for later keys.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.1.

    Args:
        num_heads: biases for so many heads.
        is_causal: keys never come later than queries.
        num_buckets: numbers a head.
        max_distance: distance from which on all are alike.
        scale: factor of the learned numbers.
    """

    def __init__(
        self,
        num_heads: int = 1,
        *,
        is_causal: bool = False,
        num_buckets: int = 32,
        max_distance: int = 128,
        scale: float = 1.0,
    ):
        super().__init__()
        check_counts(num_heads=num_heads, num_buckets=num_buckets, max_distance=max_distance)
        exact = (num_buckets if is_causal else num_buckets // 2) // 2
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"num_buckets: expected at least {2 if is_causal else 4}, and max_distance above"
                f" the {exact} distances that have a bucket each, got {num_buckets} and"
                f" max_distance={max_distance}"
            )
        self.is_causal, self.num_buckets, self.max_distance, self.scale = (
            is_causal,
            num_buckets,
            max_distance,
            scale,
        )
        self.embedding = nn.Embedding(num_buckets, num_heads)
        self._last: tuple[tuple[int, int, torch.device], Tensor] | None = None
        nn.init.normal_(self.embedding.weight, std=0.02)

    def extra_repr(self) -> str:
        return (
            f"is_causal={self.is_causal}, max_distance={self.max_distance}, scale={self.scale:.4g}"
        )

    def buckets(self, distance: Tensor) -> Tensor:
        """Bucket of each ``distance``, place of the key minus place of the query (int64)."""
        check_places(distance, "[...]", "distance")
        buckets, back = self.num_buckets, -distance
        later = torch.zeros_like(back)
        if self.is_causal:
            back = back.clamp(min=0)
        else:
            buckets //= 2
            later = (back < 0).long() * buckets
            back = back.abs()
        exact = buckets // 2
        ratio = torch.log(back.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return later + torch.where(back < exact, back, far)

    def forward(
        self, queries: int, keys: int | None = None, *, device: torch.device | None = None
    ) -> Tensor:
        """Bias ``[H, T, S]`` of the last T = `queries` of S = `keys` places (by default as many) on
        all of them.

        `device`: where it is wanted, by default where the weights are, which is elsewhere while
        they are offloaded.
        """
        keys = queries if keys is None else keys
        _check_length("queries", queries)
        _check_length("keys", keys)
        device = self.embedding.weight.device if device is None else device
        bias: Tensor
        if queries == 0 or keys == 0:
            bias = self.embedding(
                torch.zeros(queries, keys, dtype=torch.int64, device=device)
            ).movedim(-1, 0)
            return bias
        values = self.embedding(self._buckets(queries, keys, device)).mT * self.scale
        if (
            torch.compiler.is_compiling() or not plainly_called()
        ):  # unfold fixes a graph's length, and cannot be mapped
            first = torch.arange(queries - 1, -1, -1, device=values.device)
            bias = values[:, first[:, None] + torch.arange(keys, device=values.device)]
        else:
            bias = values.unfold(1, keys, 1).flip(1)  # row i reads from place T - 1 - i on
        return bias

    def _buckets(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Buckets of all distances between the places, from the least on; those of the last call
        are kept, as steps ask for the same again and again."""
        compiling = (
            torch.compiler.is_compiling()
        )  # a graph that looked at what is kept would be made anew with it
        if not compiling and self._last is not None and self._last[0] == (queries, keys, device):
            return self._last[1]
        with torch.inference_mode(
            False
        ):  # a tensor of inference's could not be used in training later
            found = self.buckets(torch.arange(queries + keys - 1, device=device) - (keys - 1))
        if type(found) is Tensor and not compiling and plainly_called():
            self._last = (queries, keys, device), found
        return found

    def at(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Bias ``[B, H, T, S]`` at ``query_position [B, T]`` and ``key_position [B, S]``, in any
        order.
        """
        for name, position in (("query_position", query_position), ("key_position", key_position)):
            letters = "[B, T]" if name == "query_position" else "[B, S]"
            check_places(position, letters, name)
            if position.dim() != 2:
                raise ValueError(f"{name}: expected {letters}, got {list(position.shape)}")
        distance = key_position[:, None] - query_position[:, :, None]
        bias: Tensor = self.embedding(self.buckets(distance)).movedim(-1, 1) * self.scale
        return bias


def _check_length(name: str, length: object) -> None:
    """A number of places, which is a symbol where graphs of any length are made."""
    if not isinstance(length, torch.SymInt):
        check_count(name, length, 0)
