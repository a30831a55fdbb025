"""One token through the whole language model in one native call.

`step_model` does it for `forward`. `Decoder` does it for a loop that owns the model's cache, and
checks only once what a token depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..nn import KeyValueState
from ..nn.step import StepBuilder, compiled_step, has_hooks, step, steps_with_state
from ..ops.step import BoundProgram, Unsuitable, Vector, may_step
from .block import CumulantBlock
from .cache import StateLayer, prepare_cache, read_state, write_state
from .inputs import check_arguments, split_mask

_Kind = TypeVar("_Kind", bound=type[nn.Module])


def emit_model(model: Any, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
    """Emit the blocks, the last norm and the logits on the embedded token x, which they change."""
    stack = model.model
    builder.rely_on_children(model, stack, stack.layers)
    if stack.wrap_bias is not None:
        raise Unsuitable
    builder.require_no_dropout(stack.dropout)
    if stack.position is not None:
        builder.rely_on(stack.position)
        builder.rely_on(stack.position.angles)
        if model.config.count_padding:
            raise Unsuitable
        builder.program.add_sinusoid(x, stack.position.scale, stack.position.angles.base)
    for block in stack.layers:
        if type(block) is not CumulantBlock or not steps_with_state(type(block.mixer)):
            raise Unsuitable
        with builder.program.reuse_vectors():
            block.emit_step(builder, x, x)
    builder.program.begin_tail()
    logits = builder.emit_projection(model.lm_head, builder.emit_norm(stack.norm, x))
    if model.logit_ffn is not None:
        builder.emit_module(model.logit_ffn, logits, logits)
    return logits


_METHODS = ("forward", "logits")
_known: dict[type, list[Any]] = {}  # of each class that `emit_model` stands for, its methods


def stepped_as_a_whole(kind: _Kind) -> _Kind:
    """Let `emit_model` replace the methods of this class and of its `model`, while unchanged."""
    _known[kind] = [getattr(kind, name, None) for name in _METHODS]
    return kind


def _calls_its_own(module: Any) -> bool:
    """Whether calling the module runs what its class was defined with, and no hook."""
    own = _known.get(type(module))
    return (
        own == [getattr(type(module), name, None) for name in _METHODS]
        and vars(module).keys().isdisjoint(_METHODS)
        and not has_hooks(module)
    )


class Read(NamedTuple):
    """What a cache holds for a step of all layers.

    tensors: of all layers' states, `counts` for each layer. masks: of the keys and values of each
    layer that has them. position: ``[B]``, the same in all layers.
    """

    tensors: list[Tensor | None]
    counts: list[int]
    masks: list[Tensor | None]
    position: Tensor

    def write(
        self,
        model: Any,
        cache: Cache,
        tensors: list[Tensor],
        masks: list[Tensor | None],
        position: Tensor,
        length: int,
    ) -> None:
        """Write states as these were read, after `length` positions in all."""
        begin, later = 0, iter(masks)
        for i, (block, count) in enumerate(zip(model.model.layers, self.counts, strict=True)):
            state = block.mixer.state_from_tensors(tensors[begin : begin + count], position)
            begin += count
            if isinstance(state, KeyValueState) and (mask := next(later)) is not None:
                state = replace(state, mask=mask)
            write_state(cache, i, state, length)


def _read_states(model: Any, cache: Cache, past_mask: Tensor | None = None) -> Read | None:
    """The states of all layers, or None if a step cannot take them.

    past_mask: ``[B, S]``, which cached positions are tokens; None: all.
    """
    tensors: list[Tensor | None] = []
    counts: list[int] = []
    masks: list[Tensor | None] = []
    position: Tensor | None = None
    for i, (block, entry) in enumerate(zip(model.model.layers, cache.layers, strict=True)):
        if type(entry) is not DynamicLayer and (
            not isinstance(entry, StateLayer) or entry.record_past
        ):
            return None
        state: Any = read_state(cache, i, past_mask)
        if isinstance(state, KeyValueState):
            masks.append(state.mask)
            if state.mask is not None:
                state = replace(state, mask=None)
        own = getattr(state, "position", None)
        if own is not None and own is not position:
            if position is not None and not torch.equal(own, position):
                return None
            position = own
        found = block.mixer.state_tensors(state)
        if not found:
            return None
        tensors += found
        counts.append(len(found))
    return None if position is None else Read(tensors, counts, masks, position)


def _can_step(model: Any, cache: Any) -> bool:
    """Whether all mixers have steps, and nothing stands between them."""
    return (
        isinstance(cache, Cache)
        and len(getattr(cache, "layers", ()))
        == len(model.model.layers)
        == model.config.num_hidden_layers
        and not cache.offloading
        and not model.config.output_hidden_states
        and all(steps_with_state(type(block.mixer)) for block in model.model.layers)
        and _calls_its_own(model)
        and _calls_its_own(model.model)
    )


def step_model(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: Any,
    others: Mapping[str, Any],
) -> CausalLMOutputWithPast | None:
    """The logits ``[B, 1, vocab_size]`` after the tokens ``input_ids [B, 1]``; writes the cache.

    None means that the layers must run instead, and the cache is as it was. others: further
    arguments of `forward`.
    """
    one = type(input_ids) is Tensor and input_ids.dim() == 2 and input_ids.shape[1] == 1
    if not one or any(value is not None for value in others.values()):
        return None
    if torch.compiler.is_compiling() or model.training or not _can_step(model, cache):
        return None
    read = _read_states(model, cache)
    if read is None or any(mask is not None for mask in read.masks):
        return None
    check_arguments(others, model.config)
    x = model.model._embed_tokens(input_ids, None)
    cache, past = prepare_cache(cache, model.config, 1)
    new, earlier = split_mask(attention_mask, x, past)
    if new is not None or (earlier is not None and read.masks):
        return None
    stepped = step(model, x, read.tensors, read.position, emit=emit_model)
    if stepped is None:
        return None
    read.write(model, cache, stepped[1], read.masks, read.position + 1, past + 1)
    return CausalLMOutputWithPast(logits=stepped[0], past_key_values=cache)


class Decoder:
    """Steps of a model that nothing else uses meanwhile, on the states of its cache.

    `step` checks nothing again and makes no new states. `close` writes the last ones to the cache.
    """

    def __init__(self, model: Any, cache: Cache, mask: Tensor | None = None):
        """mask: ``[B, S]``, which cached positions are tokens.

        Raises Unsuitable if the model's layers must run instead.
        """
        past = None if mask is None else mask.bool()
        read = _read_states(model, cache, past) if _can_step(model, cache) else None
        if read is None or model.device.type != "cpu":
            raise Unsuitable
        tensors = [None if t is None else t.contiguous() for t in read.tensors]
        size = len(read.position), 1, model.config.hidden_size
        sample = torch.empty(size, dtype=model.dtype, device="cpu")
        with torch.no_grad():
            compiled = compiled_step(model, emit_model, sample)
            program = compiled.program if may_step(sample) else None
        if program is None or compiled.has_hooks() or not program.accepts_states(sample, tensors):
            raise Unsuitable
        self._model, self._cache, self._read = model, cache, read
        self._length, self._position = cache.get_seq_length(), read.position.clone()
        states = [t for t in tensors if t is not None]
        self._bound = BoundProgram(program, states, self._position, read.masks)
        self._embed: nn.Module = model.get_input_embeddings()

    def step(self, ids: Tensor) -> Tensor:
        """The logits ``[B, vocab_size]`` after ``ids [B]``, which the next step overwrites."""
        x = self._embed(ids)
        try:
            return self._bound.step(x.float().contiguous()).to(x.dtype)
        finally:  # an interruption that comes during the call is raised behind it
            self._position += 1
            self._length += 1

    def close(self) -> None:
        """Write the states to the cache, which stays as it was if a token has failed half-way."""
        if self._bound.failed:
            return
        self._read.write(
            self._model,
            self._cache,
            self._bound.states(),
            self._bound.masks(),
            self._position,
            self._length,
        )
