"""T5's relative position bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.dispatch import no_transform_active
from .checks import check_count, check_counts, check_positions
from .step import known_to_programs


@known_to_programs
class T5RelativePositionBias(nn.Module):
    """A bias on attention scores: one learned number for each bucket of distances.

    In the first half each bucket has one distance. In the second half, buckets are ranges that grow
    logarithmically up to `max_distance`, and all larger distances share the last bucket. Without
    `is_causal`, half of the buckets are for later keys.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.1.

    Args:
        num_heads: heads H, each with its own biases.
        is_causal: keys never come later than queries.
        num_buckets: learned numbers for each head.
        max_distance: the distance from which on all share one bucket.
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
        self._kept: dict[tuple[int, int, torch.device], Tensor] = {}  # of the last call
        nn.init.normal_(self.embedding.weight, std=0.02)

    def extra_repr(self) -> str:
        return (
            f"is_causal={self.is_causal}, max_distance={self.max_distance}, scale={self.scale:.4g}"
        )

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each distance, the key's position minus the query's (int64)."""
        check_positions(distance, "[...]", "distance")
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
        """The bias ``[H, T, S]`` of the last T = `queries` of S = `keys` positions on all of them.

        keys: by default as many as queries. device: of the result, by default that of the weights,
        which differs while they are offloaded.
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
        values = self.embedding(self._distance_buckets(queries, keys, device)).mT * self.scale
        if torch.compiler.is_compiling() or not no_transform_active():
            # unfold would fix the length of a graph, and torch.func cannot map it
            first = torch.arange(queries - 1, -1, -1, device=values.device)
            bias = values[:, first[:, None] + torch.arange(keys, device=values.device)]
        else:
            bias = values.unfold(1, keys, 1).flip(1)  # row i starts at index T - 1 - i
        return bias

    def _distance_buckets(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The buckets of all distances between positions, in ascending order.

        Those of the last call are kept, as steps often need the same again.
        """
        # a graph that reads the kept buckets would be compiled again whenever they change
        compiling, call = torch.compiler.is_compiling(), (queries, keys, device)
        kept = None if compiling else self._kept.get(call)
        if kept is not None:
            return kept
        # a tensor made in inference mode could not be used in training later
        with torch.inference_mode(False):
            found = self.buckets(torch.arange(queries + keys - 1, device=device) - (keys - 1))
        if type(found) is Tensor and not compiling and no_transform_active():
            self._kept.clear()
            self._kept[call] = found
        return found

    def at(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The bias ``[B, H, T, S]`` at ``query_position [B, T]`` and ``key_position [B, S]``."""
        for name, position in (("query_position", query_position), ("key_position", key_position)):
            letters = "[B, T]" if name == "query_position" else "[B, S]"
            check_positions(position, letters, name)
            if position.dim() != 2:
                raise ValueError(f"{name}: expected {letters}, got {list(position.shape)}")
        distance = key_position[:, None] - query_position[:, :, None]
        bias: Tensor = self.embedding(self.buckets(distance)).movedim(-1, 1) * self.scale
        return bias


def _check_length(name: str, length: object) -> None:
    """A number of positions is an integer, or a symbol in a graph for any length."""
    if not isinstance(length, torch.SymInt):
        check_count(name, length, 0)
