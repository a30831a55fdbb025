"""A language model whose state is a velocity.

A token is a point, and the next token is predicted from the end of its geodesic.

B rows, T tokens, V in the vocabulary, D dimensions of embedding space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# isort: split
from geometry import geodesic


def at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


class LearnedMetric(nn.Module):
    """A metric ``g(x) = diag(exp s(x)) + U(x) U(x)ᵀ``.

    It maps points ``[..., D]`` to positive definite matrices ``[..., D, D]``. ``s [D]`` and ``√D U
    [D, rank]`` are tanh of the outputs of a network with one hidden layer of tanh units, so the
    eigenvalues of ``g`` are always between 1/e and e + rank. The last layer starts small, so ``g``
    starts near the identity. It does not start at the identity, where ``U Uᵀ`` would have no
    gradient.
    """

    def __init__(self, dim: int, rank: int, hidden: int) -> None:
        super().__init__()
        at_least_one(dim=dim, rank=rank, hidden=hidden)
        self.dim, self.rank = dim, rank
        self.hidden = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, dim * (1 + rank))
        nn.init.normal_(self.out.weight, std=0.1 * hidden**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        bounded = torch.tanh(self.out(torch.tanh(self.hidden(x))))
        s, u = bounded.split([self.dim, self.dim * self.rank], -1)
        u = u.unflatten(-1, (self.dim, self.rank)) * self.dim**-0.5
        return torch.diag_embed(s.exp()) + u @ u.mT


class GeodesicLanguageModel(nn.Module):
    """Next-token logits by motion in embedding space, token by token.

    For token t with embedding ``e_t`` and the velocity ``w_{t-1}`` in which the last motion ended
    (zero before the first token):

        f, c     = halves of A [e_t; w_{t-1}] + a
        v_t      = speed · n / |n|,   n = sigmoid(f) ∘ w_{t-1} + c
        x_t, w_t = end point and end velocity, after unit time, of the geodesic from e_t with v_t
        logits_t = scale · x_t Eᵀ + b,   E the embedding matrix

    The velocity ``w_T [B, D]`` is the whole state. ``steps`` are those of the integration. ``flat``
    has no metric and moves in straight lines: ``x_t = e_t + v_t``, ``w_t = v_t``; with the same
    seed, its other weights start the same. ``checkpointing`` keeps each token's ``e_t`` and ``v_t``
    for ``backward()``, which integrates again.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rank: int = 4,
        steps: int = 1,
        hidden: int = 64,
        flat: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        at_least_one(vocab_size=vocab_size, dim=dim, rank=rank, steps=steps, hidden=hidden)
        self.steps, self.checkpointing = steps, checkpointing
        # points at a distance of about 1 from the origin
        self.embedding = nn.Parameter(torch.randn(vocab_size, dim) * dim**-0.5)
        self.update = nn.Linear(2 * dim, 2 * dim)
        self.speed = nn.Parameter(torch.tensor(2.0))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.metric = None if flat else LearnedMetric(dim, rank, hidden)

    def forward(self, ids: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[B, T, V]`` of the tokens after ``ids [B, T]``, and the velocity ``[B, D]``."""
        dim = self.embedding.shape[1]
        if ids.ndim != 2 or not ids.shape[1]:
            raise ValueError(f"ids: expected [B, T] with T at least 1, got {list(ids.shape)}")
        if velocity is None:
            velocity = self.embedding.new_zeros(len(ids), dim)
        if velocity.shape != (len(ids), dim):
            raise ValueError(
                f"velocity: expected [B, D] = {[len(ids), dim]}, got {list(velocity.shape)}"
            )
        points = []
        for e in self.embedding[ids].unbind(1):
            x, velocity = self.move(e, self.steer(e, velocity))
            points.append(x)
        return self.scale * torch.stack(points, 1) @ self.embedding.T + self.bias, velocity

    def steer(self, e: Tensor, w: Tensor) -> Tensor:
        """The velocity ``[B, D]`` of the motion from ``e``, after an arrival with ``w``."""
        f, c = self.update(torch.cat((e, w), -1)).chunk(2, -1)
        return self.speed * F.normalize(torch.sigmoid(f) * w + c, dim=-1)

    def move(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """End point and end velocity, ``[B, D]`` each, of the motion from ``x`` with ``v``."""
        if self.metric is None:
            return x + v, v
        if self.checkpointing and torch.is_grad_enabled():
            # non-reentrant checkpoints use hooks on saved tensors, which torch.func.vjp does not
            # support
            return checkpoint(
                geodesic,
                self.metric,
                x,
                v,
                self.steps,
                use_reentrant=True,
                preserve_rng_state=False,
            )
        return geodesic(self.metric, x, v, self.steps)
