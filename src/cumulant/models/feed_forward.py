"""Feed-forwards of the language model, in each block and over the logits."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import ElitaFeedForward
from ..nn.projection import project
from ..nn.step import StepBuilder, known_to_programs
from ..ops.pointwise import swiglu
from ..ops.step import Vector
from .config import CumulantConfig


@known_to_programs
class FeedForward(nn.Module):
    """SwiGLU, ``W_down(silu(W_gate x) ⊙ W_up x)``, or GELU, ``W_down gelu(W_up x)``."""

    def __init__(self, config: CumulantConfig):
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        assert hidden is not None
        self.gate_proj = (
            nn.Linear(dim, hidden, bias=False) if config.feed_forward == "swiglu" else None
        )
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.out_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up = project(self.up_proj, x)
        hidden = (
            nn.functional.gelu(up)
            if self.gate_proj is None
            else swiglu(project(self.gate_proj, x), up)
        )
        out: Tensor = project(self.out_proj, hidden)
        return out

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        if self.gate_proj is None:
            hidden = builder.program.activate("gelu", builder.emit_projection(self.up_proj, x))
        else:
            gate, up = (
                builder.emit_projection(self.gate_proj, x),
                builder.emit_projection(self.up_proj, x),
            )
            hidden = builder.program.activate("swiglu", gate, up)
        return builder.emit_projection(self.out_proj, hidden, residual, add=residual is not None)


@known_to_programs
class LogitFeedForward(nn.Module):
    """``logits + W_down silu(W_up logits)``: corrections that depend on the likely next tokens.

    It starts as the identity.

    Source: Sharma 2023, ELiTA, "other methods".

    Args:
        vocab_size: number of logits.
        hidden: number of hidden channels.
    """

    def __init__(self, vocab_size: int, hidden: int):
        super().__init__()
        self.up_proj = nn.Linear(vocab_size, hidden)
        self.out_proj = nn.Linear(hidden, vocab_size)
        self.out_proj.starts_at_zero = True  # type: ignore[assignment]

    def forward(self, logits: Tensor) -> Tensor:
        """``[..., vocab_size]`` -> ``[..., vocab_size]``."""
        out: Tensor = logits + project(
            self.out_proj, nn.functional.silu(project(self.up_proj, logits))
        )
        return out

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        hidden = builder.program.activate("silu", builder.emit_projection(self.up_proj, x))
        return builder.emit_projection(self.out_proj, hidden, residual, add=residual is not None)


def build_feed_forward(config: CumulantConfig) -> FeedForward | ElitaFeedForward | None:
    """The feed-forward of a block; None if it has none."""
    if config.feed_forward == "none":
        return None
    if config.feed_forward == "elita":
        return ElitaFeedForward(
            config.hidden_size, config.intermediate_size, factor=config.feed_forward_factor
        )
    return FeedForward(config)
