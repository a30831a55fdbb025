"""ELiTA's feed-forward: bilinear in two projections of its input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.bilinear import bilinear
from ..ops.step import Vector
from .checks import check_counts, check_features
from .projection import is_plain, project
from .step import StepBuilder, known_to_programs


@known_to_programs
class ElitaFeedForward(nn.Module):
    """``y_k = Σ_{i,j} W₃[i, j, k] σ(W₁ x + b₁)_i σ(W₂ x + b₂)_j + b₃_k`` with swish σ.

    The hidden layer has ``hidden · factor`` channels, the products of all pairs. They are computed
    for a block of tokens at a time and never stored.

    Source: Sharma 2023, ELiTA, Feed-Forward2.

    Args:
        dim: model dim D.
        hidden: channels i of the first projection; by default D.
        factor: channels j of the second projection, a few.
        bias: add b₁, b₂ and b₃.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, factor: int = 8, bias: bool = True):
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_counts(dim=dim, hidden=hidden, factor=factor)
        self.dim, self.hidden, self.factor = dim, hidden, factor
        self.hidden_proj = nn.Linear(dim, hidden, bias=bias)
        self.factor_proj = nn.Linear(dim, factor, bias=bias)
        self.out_proj = nn.Linear(hidden * factor, dim, bias=bias)  # column j * hidden + i
        if bias:
            for layer in (self.hidden_proj, self.factor_proj, self.out_proj):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        check_features(x, self.hidden_proj, self.dim, "[..., D]")
        hidden, factor = F.silu(project(self.hidden_proj, x)), F.silu(project(self.factor_proj, x))
        if is_plain(self.out_proj):
            return bilinear(hidden, factor, self.out_proj.weight, self.out_proj.bias)
        return project(self.out_proj, (factor[..., None] * hidden[..., None, :]).flatten(-2))

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        builder.rely_on(self)
        program = builder.program
        hidden, factor = (
            program.activate("silu", builder.emit_projection(projection, x))
            for projection in (self.hidden_proj, self.factor_proj)
        )
        products = program.outer(factor, hidden)
        return builder.emit_projection(self.out_proj, products, residual, add=residual is not None)
