"""A byte model whose state is a velocity: each token is a point, the next one is predicted where its geodesic ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geometry import geodesic


class LearnedMetric(nn.Module):
    """``g(x) = diag(exp s(x)) + U(x) U(x)ᵀ``: points ``[..., D]`` to positive definite matrices ``[..., D, D]``.

    ``s [D]`` and ``U [D, rank]`` come from a network with one hidden layer of ``hidden`` tanh units. Its last layer
    starts small, so ``g`` starts near the identity, but not at zero, where ``U Uᵀ`` would have no gradient.
    """

    def __init__(self, dim: int, rank: int = 4, hidden: int = 64) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("rank", rank), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.dim, self.rank = dim, rank
        self.hidden = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, dim * (1 + rank))
        nn.init.normal_(self.out.weight, std=0.1 * hidden**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        s, u = self.out(torch.tanh(self.hidden(x))).split([self.dim, self.dim * self.rank], -1)
        u = u.unflatten(-1, (self.dim, self.rank))
        return torch.diag_embed(s.exp()) + u @ u.mT


class GeodesicLanguageModel(nn.Module):
    """Next-token logits by motion in embedding space, token by token.

    For token t with embedding ``e_t`` and the velocity ``w_{t-1}`` in which the last motion ended (zero before the
    first token):

        v_t      = f ∘ w_{t-1} + c,   f = sigmoid(first half), c = second half of  A [e_t; w_{t-1}] + a
        x_t, w_t = end point and end velocity of the geodesic from e_t with velocity v_t, after unit time
        logits_t = (scale · x_t) Eᵀ + b,   E the embedding matrix

    The velocity ``w_T [B, D]`` is all that is carried. ``metric=None`` moves in straight lines: ``x_t = e_t + v_t``
    and ``w_t = v_t``. With ``checkpointing``, training keeps each token's ``e_t`` and ``v_t`` and integrates again in
    the backward pass.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        steps: int = 1,
        metric: nn.Module | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("dim", dim), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.steps, self.metric, self.checkpointing = steps, metric, checkpointing
        self.embedding = nn.Parameter(torch.randn(vocab_size, dim))
        self.update = nn.Linear(2 * dim, 2 * dim)
        self.scale = nn.Parameter(torch.tensor(0.5 * dim**-0.5))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, ids: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, Tensor]:
        points = []
        embedded = self.embedding[ids]
        if velocity is None:
            velocity = embedded.new_zeros(ids.shape[0], embedded.shape[-1])
        for e in embedded.unbind(1):
            gate, correction = self.update(torch.cat((e, velocity), -1)).chunk(2, -1)
            x, velocity = self.move(e, torch.sigmoid(gate) * velocity + correction)
            points.append(x)
        logits = self.scale * torch.stack(points, 1) @ self.embedding.T + self.bias
        return logits, velocity

    def move(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.metric is None:
            return x + v, v
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(geodesic, self.metric, x, v, self.steps, use_reentrant=True)
        return geodesic(self.metric, x, v, self.steps)
