"""Learnable feature maps for `LinearAttention`, and for `cumulant.linear_attention` as callables.

Each maps ``[B, H, T, K]`` to ``[B, H, T, F]`` with separate weights for every head. Queries and
keys have separate maps: ``feature_map=(HedgehogFeatureMap(H, K), HedgehogFeatureMap(G, K))``, or by
name, ``"hedgehog"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_counts, check_dtype, check_tensor


class LearnedFeatureMap(nn.Module):
    """A feature map with separate weights for each of `num_heads` heads of dim K."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        check_counts(num_heads=num_heads, head_dim=head_dim)
        self.num_heads, self.head_dim = num_heads, head_dim
        for name, value in self.initial().items():
            setattr(self, name, nn.Parameter(value))

    def initial(self) -> dict[str, Tensor]:
        """The initial value of each weight."""
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        check_tensor(x, "[B, H, T, K]")
        if x.dim() != 4 or x.shape[1] != self.num_heads or x.shape[3] != self.head_dim:
            raise ValueError(
                f"feature_map: expected [B, H, T, K] with H={self.num_heads}, K={self.head_dim},"
                f" got {list(x.shape)}"
            )
        check_dtype(x, self, "[B, H, T, K]")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class HedgehogFeatureMap(LearnedFeatureMap):
    """``φ(x) = [softmax(W x), softmax(-W x)]``, F = 2K.

    Its weights are positive, and as spiky as those of softmax. W starts as the identity.

    Source: Zhang et al. 2024, "The Hedgehog & the Porcupine", arXiv 2402.04347, section 4.2.

    Args:
        num_heads: heads H, each with its own W ``[K, K]``.
        head_dim: K.
    """

    weight: Tensor

    def initial(self) -> dict[str, Tensor]:
        return {"weight": torch.eye(self.head_dim).repeat(self.num_heads, 1, 1)}

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        y = x @ self.weight
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)


class RebasedFeatureMap(LearnedFeatureMap):
    """Monomials of degree 2 of ``y = γ ⊙ LayerNorm(x) + β``, F = K (K + 1) / 2.

    So ``φ(q)·φ(k) = (y_q·y_k)² / K``. γ starts at 1 and β at 0.

    Source: Aksenov et al. 2024 (ReBased), arXiv 2402.10644.

    Args:
        num_heads: heads H, each with its own γ and β ``[K]``.
        head_dim: K.
    """

    gamma: Tensor
    beta: Tensor

    def initial(self) -> dict[str, Tensor]:
        shape = (self.num_heads, 1, self.head_dim)
        return {"gamma": torch.ones(shape), "beta": torch.zeros(shape)}

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        y = F.layer_norm(x, x.shape[-1:]) * self.gamma + self.beta
        i, j = torch.triu_indices(self.head_dim, self.head_dim, device=x.device)
        multiplicity = 2.0 - (i == j).to(y.dtype)
        features: Tensor = y[..., i] * y[..., j] * (multiplicity / self.head_dim).sqrt()
        return features
