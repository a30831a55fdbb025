"""Language models whose states are inputs and outputs, for `torch.export`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from ..models import CumulantForCausalLM, ModelState
from ..nn import KeyValueState, SlidingWindowAttention


class StatefulModel(nn.Module):
    """A causal language model as a function ``(ids, state) -> (logits, state)``.

    It computes what ``model(ids, past_key_values=cache)`` computes, without the cache. Rows of a
    batch have no padding. `export_program` makes programs of it.
    """

    def __init__(self, model: CumulantForCausalLM):
        super().__init__()
        if not isinstance(model, CumulantForCausalLM):
            raise TypeError(f"model: expected a CumulantForCausalLM, got {type(model).__name__}")
        self.model = model

    @torch.no_grad()
    def initial_state(self, batch: int = 1) -> ModelState:
        """The state before the first token, for `batch` rows.

        A sliding window has its final size, with all slots masked, as programs have fixed sizes.
        """
        stack: Any = self.model.model
        weight = next(self.model.parameters())
        dtype = self.model.dtype
        x = torch.zeros(batch, 0, self.model.config.hidden_size, dtype=dtype, device=weight.device)
        layers = tuple(
            _fill_window(block.mixer, block.mixer(x, return_state=True)[1])
            for _ in range(self.model.config.wraps)
            for block in stack.layers
        )
        position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return ModelState(layers, position)

    def forward(self, input_ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Logits ``[B, T, vocab_size]`` after ``input_ids [B, T]``, and the new state."""
        stack: Any = self.model.model
        x, T = stack.embed_tokens(input_ids), input_ids.shape[1]
        if stack.position is not None:
            position = state.position[:, None] + torch.arange(T, device=x.device)
            x = x + stack.position(position).to(x.dtype)
        states: list[Any] = []
        for wrap in range(self.model.config.wraps):
            if stack.wrap_bias is not None:
                x = x + stack.wrap_bias[wrap].to(x.dtype)
            for block in stack.layers:
                h = block.mixer_norm(x)
                past = state.layers[len(states)]
                h, after = block.mixer(h, state=past, return_state=True)
                states.append(after)
                x = x + h
                if block.feed_forward is not None:
                    x = x + block.feed_forward(block.feed_forward_norm(x))
        return self.model.logits(stack.norm(x)), ModelState(tuple(states), state.position + T)


def _fill_window(mixer: nn.Module, state: Any) -> Any:
    """The state of a sliding window with all its slots, which are masked."""
    if not isinstance(mixer, SlidingWindowAttention):
        return state
    B, G, _, K = state.key.shape
    slots = state.key.new_zeros(B, G, mixer.window - 1, K)
    mask = torch.zeros(B, mixer.window - 1, dtype=torch.bool, device=slots.device)
    return KeyValueState(slots, slots.clone(), mask, state.position)


def export_program(
    model: CumulantForCausalLM, *, step: bool = False, batch: int = 1
) -> tuple[ExportedProgram, ModelState]:
    """The model as a program of `torch.export`, and its state before the first token.

    ``program.module()(ids, state)`` returns the logits ``[B, T, vocab_size]`` and the new state,
    which the program of a prompt and that of a step exchange. `torch.export.save` writes it.

    Args:
        model: in evaluation mode.
        step: the program reads one token a call; otherwise any number from 2 on.
        batch: rows B of both programs.

    Raises:
        TypeError: the model is not causal.
        ValueError: the model is being trained.
    """
    stateful = StatefulModel(model)
    if model.training:
        raise ValueError("model: is in training mode; call model.eval() first")
    stateful.eval()
    initial = stateful.initial_state(batch)
    length = 1 if step else 8
    with torch.no_grad():
        past = stateful(torch.zeros(batch, 5, dtype=torch.int64, device=model.device), initial)[1]
        ids = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
        shapes: Any = ShapesCollection()
        if not step:
            shapes[ids] = {1: Dim.DYNAMIC}
        for layer in past.layers:
            if isinstance(layer, KeyValueState) and layer.mask is None:  # it grows
                shapes[layer.key] = shapes[layer.value] = {layer.key.dim() - 2: Dim.DYNAMIC}
        program = torch.export.export(stateful, (ids, past), dynamic_shapes=shapes)
    program.example_inputs = None  # `torch.export.load` reads plain tensors, and no state classes
    return program, initial
