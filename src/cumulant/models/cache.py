"""Mixer states in transformers' caches.

Softmax and gated attention keep their keys and values in transformers' own `DynamicLayer` or
`StaticLayer`. All other mixers keep a state of fixed size in `StateLayer`, a subclass of
`LinearAttentionLayer`. `DynamicCache(config=model.config)` and `StaticCache` build it for the layer
type "cumulant_state".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    StaticLayer,
)

from ..nn import KeyValueState
from ..ops.state import State, register_state
from .config import CumulantConfig

MARGIN = 32  # tokens that another `crop` can remove, after a first one
MAX_RECORDED = 256  # `crop` shortens longer records to `MARGIN` tokens

# The base class of quantized layers, which older versions of transformers do not have.
_QuantizedLayer: Any = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)

_BUILD = "build it with transformers.DynamicCache(config=model.config)"


class StateLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc]
    """A mixer state of fixed size, and the number of positions so far.

    Such a state cannot be cut as keys and values can. So while the layer records its past, for
    assisted generation, it keeps an earlier state and the block's inputs since then. `crop` runs
    the mixer again on the inputs that stay.
    """

    _layer_type = "cumulant_state"
    is_compileable = False  # states are replaced, not written in place
    is_croppable = True
    is_sliding = False

    def __init__(self, **kwargs: Any):
        LinearAttentionLayer.__init__(self, number_of_states=1)
        self.device: torch.device | None = None
        self.reset()

    def reset(self) -> None:
        self.state: State | None = None
        self.length = 0
        self.has_previous_state = {0: False}
        self._forget_inputs()

    def _forget_inputs(self) -> None:
        self.base: State | None = None
        self.inputs: list[tuple[Tensor, Tensor | None]] = []

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    def record(self, block: Any, x: Tensor, key_mask: Tensor | None) -> None:
        """Keep the next input of `block`, if the layer records its past."""
        if not self.record_past:
            if self.inputs:
                self._forget_inputs()
            return
        if not self.inputs:
            self.base = self.state
        self.inputs.append((x.detach(), key_mask))
        self.block = ref(block)  # copies of the cache share the model

    def write(self, state: State | None, length: int) -> None:
        self.state, self.length, self.has_previous_state = state, length, {0: state is not None}
        if self.device is None and state is not None:
            self.device = next(iter(state.tensors().values())).device

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "a fixed-size state has no keys and values; use `state` and `write`"
        )

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def offload(self) -> None:
        self._map_tensors(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map_tensors(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_tensors(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_tensors(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_tensors(lambda x: x[indices])

    def _map_tensors(self, function: Any) -> None:
        if self.state is not None:
            self.state = self.state.map(function)
        if self.base is not None:
            self.base = self.base.map(function)
        self.inputs = [
            (function(x), None if mask is None else function(mask)) for x, mask in self.inputs
        ]

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens from the state."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: expected 0 or the negative of a number, got {tokens_to_remove}"
            )
        count, recorded = -tokens_to_remove, sum(x.shape[1] for x, _ in self.inputs)
        if count > recorded:
            raise RuntimeError(
                f"crop: cannot take {count} tokens back from a fixed-size state that has recorded"
                f" {recorded}; call activate_past_recording() on the cache before they are read, or"
                " keep the state (export_state)"
            )
        if count == 0 and recorded <= MAX_RECORDED:
            return
        x, mask = self._recorded_inputs(recorded - count)
        first = max(x.shape[1] - MARGIN, 0)
        self.base = self._state_after(x[:, :first], mask, self.base)
        rest = x[:, first:].clone(), None if mask is None else mask[:, first:].clone()
        self.inputs = [rest] if rest[0].shape[1] else []
        if count:
            self.write(self._state_after(*rest, self.base), self.length - count)

    def _recorded_inputs(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The first `length` recorded inputs ``[B, T, D]``, and their mask."""
        x = torch.cat([x for x, _ in self.inputs], 1)[:, :length]
        if all(mask is None for _, mask in self.inputs):
            return x, None
        masks = [
            x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            for x, mask in self.inputs
        ]
        return x, torch.cat(masks, 1)[:, :length]

    def _state_after(self, x: Tensor, mask: Tensor | None, state: State | None) -> State | None:
        """The state after `state` and the block's inputs ``x [B, T, D]``."""
        if x.shape[1] == 0:
            return state
        block: Any = self.block()
        after: State = block.state_after(x, None if mask is None else mask[:, : x.shape[1]], state)
        return after


# states have a fixed size, so dynamic and static caches use the same layer
STATIC_LAYER_TYPE_MAPPING[StateLayer._layer_type] = StateLayer


def prepare_cache(cache: Any, config: CumulantConfig, new: int) -> tuple[Cache, int]:
    """The cache, ready for `new` more tokens, and the number of tokens that it has seen.

    Caches that do not fit the model raise an error.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"past_key_values: expected a transformers Cache, got {type(cache).__name__}; {_BUILD}"
        )
    if not cache.layers:  # built without a configuration
        cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
    seen = [_layer_length(entry) for entry in cache.layers]
    if None in seen or not any(seen) or not getattr(cache, "fits_cumulant", False):
        _check_layer_types(cache, config)
        # one check is enough, also for a filled cache, such as that of prefix tuning
        cache.fits_cumulant = True
    past = int(cache.get_seq_length())
    if seen.count(past) != len(seen):
        found = sorted(length for length in seen if length is not None)
        raise ValueError(
            "past_key_values: its layers have seen different numbers of tokens,"
            f" {found[0]} to {found[-1]}; a call failed half-way, or layers were changed one by"
            " one: start again with a fresh cache"
        )
    for entry in cache.layers:
        if isinstance(entry, StaticLayer) and past + new > entry.max_cache_len:
            raise ValueError(
                f"past_key_values: a static cache of max_cache_len={entry.max_cache_len} cannot"
                f" hold {past} + {new} tokens; make it larger, or use"
                " DynamicCache(config=model.config)"
            )
    return cache, past


def _layer_length(entry: Any) -> int | None:
    """The number of tokens that a layer has seen; None for a layer that no mixer can use."""
    if isinstance(entry, StateLayer):
        return entry.length
    if not isinstance(entry, (DynamicLayer, StaticLayer)) or isinstance(entry, _QuantizedLayer):
        return None
    return int(entry.get_seq_length())


def _check_layer_types(cache: Cache, config: CumulantConfig) -> None:
    """Every layer has the type that this model's mixer needs."""
    wanted = config.layer_types
    if len(cache.layers) != len(wanted):
        raise ValueError(
            f"past_key_values: expected {len(wanted)} layers, as the model has, got"
            f" {len(cache.layers)}; {_BUILD}"
        )
    for i, (entry, kind) in enumerate(zip(cache.layers, wanted, strict=True)):
        if _layer_length(entry) is None or isinstance(entry, StateLayer) != (
            kind == StateLayer._layer_type
        ):
            raise TypeError(
                f"past_key_values: layer {i} is a {type(entry).__name__} of a"
                f" {type(cache).__name__}, which cannot hold this model's state there; {_BUILD}"
            )


def read_state(cache: Cache, layer: int, past_mask: Tensor | None) -> State | None:
    """The state of mixer `layer`. ``past_mask [B, S]`` is True at cached tokens; None: all are."""
    entry = cache.layers[layer]
    if isinstance(entry, StateLayer):
        return entry.state
    length = int(entry.get_seq_length()) if entry.is_initialized else 0
    if length == 0:
        return None
    if cache.offloading:
        entry.prefetch()
    key, value = entry.keys[:, :, :length], entry.values[:, :, :length]
    if past_mask is None:
        position = torch.full((key.shape[0],), length, dtype=torch.int64, device=key.device)
    else:
        position = past_mask.sum(1)
    return KeyValueState(key, value, past_mask, position)


def write_state(cache: Cache, layer: int, state: State, length: int) -> None:
    """Store the state of mixer `layer` after `length` positions in all."""
    entry = cache.layers[layer]
    if isinstance(entry, StateLayer):
        entry.write(state, length)
        return
    assert isinstance(state, KeyValueState)
    if not entry.is_initialized:
        entry.lazy_initialization(state.key, state.value)
    if isinstance(entry, StaticLayer):
        seen = int(entry.cumulative_length)
        entry.keys[:, :, seen:length] = state.key[:, :, seen:]
        entry.values[:, :, seen:length] = state.value[:, :, seen:]
        entry.cumulative_length.fill_(length)
    else:
        entry.keys, entry.values = state.key, state.value
    if cache.offloading:
        cache.offload(layer, cache.only_non_sliding)


def record_input(cache: Cache, layer: int, block: Any, x: Tensor, key_mask: Tensor | None) -> None:
    """Keep a block's input if the cache records its past, for ``block.state_after``."""
    entry = cache.layers[layer]
    if isinstance(entry, StateLayer):
        entry.record(block, x, key_mask)


@dataclass(frozen=True)
class ModelState(State):
    """The states of all layers of a model. position: ``[B]`` int64, the number of tokens seen."""

    layers: tuple[Any, ...]
    position: Tensor


register_state(ModelState)


def export_state(cache: Cache) -> ModelState:
    """A whole cache as one state, for `cumulant.save_state`. The batch must have no padding."""
    layers = tuple(read_state(cache, i, None) for i in range(len(cache.layers)))
    if not layers or any(layer is None for layer in layers):
        raise ValueError("past_key_values: the cache is empty; run the model on some tokens first")
    if any(isinstance(entry, StaticLayer) for entry in cache.layers):  # it is written in place
        layers = tuple(layer.clone() for layer in layers if layer is not None)
    first: Any = layers[0]
    length = int(cache.get_seq_length())
    return ModelState(layers, torch.full_like(first.position, length))


def import_state(cache: Cache, state: ModelState) -> Cache:
    """Fill a fresh cache of the model from a state written by `export_state`."""
    if not isinstance(state, ModelState) or len(state.layers) != len(cache.layers):
        raise ValueError(
            f"state: expected the state of a model with {len(cache.layers)} layers, got"
            f" {type(state).__name__} with {len(getattr(state, 'layers', ()))} layers"
        )
    for i, (entry, layer) in enumerate(zip(cache.layers, state.layers, strict=True)):
        if not isinstance(entry, StateLayer) and not isinstance(layer, KeyValueState):
            raise ValueError(
                f"state: layer {i} holds a {type(layer).__name__}, which is not this model's mixer"
                " there"
            )
        write_state(cache, i, layer, int(state.position.max()))
    return cache


def cache_bytes(cache: Cache) -> int:
    """The size of a cache in bytes."""
    return sum(
        s.nbytes for i in range(len(cache.layers)) if (s := read_state(cache, i, None)) is not None
    )
