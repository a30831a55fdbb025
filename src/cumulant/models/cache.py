"""Mixer states in transformers' caches.

Softmax mixers live in transformers' own `DynamicLayer` and `DynamicSlidingWindowLayer`; fixed-size states in
`StateLayer`, a `LinearAttentionLayer` that `DynamicCache(config=model.config)` builds for the layer type
"cumulant_state". Beam reordering, reset and offloading are transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ..nn import KeyValueState
from ..ops.state import State, register


class StateLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc]
    """A mixer state of fixed size, and the number of positions so far."""

    _layer_type = "cumulant_state"
    is_compileable = False  # states are replaced, not written in place
    is_croppable = False
    is_sliding = False

    def __init__(self, **kwargs: Any):
        LinearAttentionLayer.__init__(self, number_of_states=1)
        self.device: torch.device | None = None
        self.state: State | None = None
        self.length = 0

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    def write(self, state: State, length: int) -> None:
        self.state, self.length, self.has_previous_state = state, length, {0: True}
        if self.device is None:
            self.device = next(iter(state.tensors().values())).device

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a fixed-size state holds no keys and values; use `state` and `write`")

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def offload(self) -> None:
        self._replace(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._replace(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._replace(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a fixed-size state cannot be rolled back; keep the earlier one (export_state)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace(lambda x: x[indices])

    def _replace(self, function: Any) -> None:
        if self.state is not None:
            self.state = self.state.map(function)


def read_state(cache: Cache, layer: int, past_mask: Tensor | None) -> State | None:
    """The state of mixer `layer`; `past_mask` ``[B, S]`` says which cached positions hold tokens (None: all)."""
    entry = cache.layers[layer]
    if isinstance(entry, StateLayer):
        return entry.state
    if isinstance(entry, LinearAttentionCacheLayerMixin):
        raise TypeError(
            f"past_key_values: layer {layer} is a {type(entry).__name__}; build the cache from the model's config"
        )
    if not entry.is_initialized or entry.get_seq_length() == 0:
        return None
    key, value = entry.keys, entry.values
    if past_mask is None:
        position = torch.full((key.shape[0],), entry.get_seq_length(), dtype=torch.int64, device=key.device)
        return KeyValueState(key, value, None, position)
    position = past_mask.sum(1)
    if isinstance(entry, DynamicSlidingWindowLayer):  # tokens stand at the end, whatever the padding was
        past_mask = torch.arange(key.shape[2], device=key.device) >= key.shape[2] - position[:, None]
    return KeyValueState(key, value, past_mask, position)


def write_state(cache: Cache, layer: int, state: State, length: int) -> None:
    """Keep the state of mixer `layer` after `length` positions in all."""
    entry = cache.layers[layer]
    if isinstance(entry, StateLayer):
        entry.write(state, length)
        return
    assert isinstance(state, KeyValueState)
    if not entry.is_initialized:
        entry.lazy_initialization(state.key, state.value)
    entry.keys, entry.values = state.key, state.value
    if isinstance(entry, DynamicSlidingWindowLayer):
        entry.cumulative_length = length


@dataclass(frozen=True)
class ModelState(State):
    """The states of all layers of a model. position: ``[B]`` int64, tokens seen."""

    layers: tuple[Any, ...]
    position: Tensor


register(ModelState)


def export_state(cache: Cache) -> ModelState:
    """All of a cache as one state, for `cumulant.save_state`. The batch must hold no padding."""
    layers = tuple(read_state(cache, i, None) for i in range(len(cache.layers)))
    if not layers or any(layer is None for layer in layers):
        raise ValueError("past_key_values: the cache is empty; run the model on some tokens first")
    first: Any = layers[0]
    length = cache.get_seq_length()
    return ModelState(layers, torch.full_like(first.position, length))


def import_state(cache: Cache, state: ModelState) -> Cache:
    """Fill a fresh cache of the model from a state written by `export_state`."""
    if not isinstance(state, ModelState) or len(state.layers) != len(cache.layers):
        raise ValueError(
            f"state: expected the state of a model with {len(cache.layers)} layers, got {type(state).__name__}"
            f" with {len(getattr(state, 'layers', ()))} layers"
        )
    for i, (entry, part) in enumerate(zip(cache.layers, state.layers, strict=True)):
        if isinstance(entry, StateLayer) == isinstance(part, KeyValueState):
            raise ValueError(f"state: layer {i} holds a {type(part).__name__}, which is not this model's mixer there")
        write_state(cache, i, part, int(state.position.max()))
    return cache


def cache_bytes(cache: Cache) -> int:
    """Bytes held by a cache."""
    return sum(s.nbytes for i in range(len(cache.layers)) if (s := read_state(cache, i, None)) is not None)
