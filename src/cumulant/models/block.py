"""One block of the stack: a token mixer and a feed-forward, each with a norm and a residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..nn.norms import make_norm
from ..nn.step import StepBuilder, known_to_programs, step, step_mixer, steps_with_state
from ..ops.step import Vector
from .cache import read_state, record_input, write_state
from .config import CumulantConfig
from .feed_forward import build_feed_forward
from .mixers import build_mixer


@known_to_programs
class CumulantBlock(GradientCheckpointingLayer):  # type: ignore[misc]
    """``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))`` if it has a feed-forward."""

    def __init__(self, config: CumulantConfig, layer: int):
        super().__init__()
        self.mixer_norm = make_norm(
            config.norm, config.hidden_size, config.norm_eps, affine=config.norm_affine
        )
        self.mixer = build_mixer(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        projections: list[Any] = [self.mixer.out_proj]
        self.feed_forward = build_feed_forward(config)
        if self.feed_forward is not None:
            self.feed_forward_norm = make_norm(
                config.norm, config.hidden_size, config.norm_eps, affine=config.norm_affine
            )
            projections.append(self.feed_forward.out_proj)
        for projection in projections:
            projection.writes_residual = True

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        past_mask: Tensor | None = None,
        length: int = 0,
        cache_index: int = 0,
    ) -> Tensor:
        """``x [B, T, D]`` -> ``[B, T, D]``. cache_index: the mixer's layer in the cache.

        past_mask: ``[B, S]``, which cached positions are tokens. length: cached and new positions.
        """
        state: Any = None
        if past_key_values is not None:
            state = read_state(past_key_values, cache_index, past_mask)
            record_input(past_key_values, cache_index, self, x, key_mask)
        if state is not None and key_mask is None and steps_with_state(type(self.mixer)):
            stepped = step_mixer(self.mixer, x, state, self)
            if stepped is not None:
                write_state(past_key_values, cache_index, stepped[1], length)
                return stepped[0]
        h = self.mixer_norm(x)
        if past_key_values is None:
            h = self.mixer(h, key_mask=key_mask, cu_seqlens=cu_seqlens)
        else:
            h, state = self.mixer(h, key_mask=key_mask, state=state, return_state=True)
            write_state(past_key_values, cache_index, state, length)
        x = x + self.dropout(h)
        if self.feed_forward is not None:
            fed = step(self, x, emit=CumulantBlock.emit_feed_forward)
            x = (
                x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
                if fed is None
                else fed[0]
            )
        return x

    def state_after(self, x: Tensor, key_mask: Tensor | None, state: Any) -> Any:
        """The mixer's state after the block's inputs ``x [B, T, D]``, without its output."""
        return self.mixer(self.mixer_norm(x), key_mask=key_mask, state=state, return_state=True)[1]

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.emit_module(self.mixer, builder.emit_norm(self.mixer_norm, x), x)
        return self.emit_feed_forward(builder, x, residual)

    def emit_feed_forward(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        builder.rely_on(self)
        builder.require_no_dropout(self.dropout)
        if self.feed_forward is not None:
            builder.emit_module(self.feed_forward, builder.emit_norm(self.feed_forward_norm, x), x)
        return x
