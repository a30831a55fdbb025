"""Learnable feature maps for `LinearAttention`, and for `cumulant.linear_attention` as callables.

Each sends ``[B, H, T, K]`` to ``[B, H, T, F]`` with weights of its own for every head. Queries and keys have maps of
their own: ``feature_map=(HedgehogFeatureMap(H, K), HedgehogFeatureMap(G, K))``, or by name, ``"hedgehog"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HedgehogFeatureMap(nn.Module):
    """``φ(x) = [softmax(W x), softmax(-W x)]``, F = 2K: positive, and spiky where softmax is (Zhang et al. 2024, "The
    Hedgehog & the Porcupine", arXiv 2402.04347, section 4.2). W starts as the identity.

    Args:
        num_heads: heads H, each with its own W ``[K, K]``.
        head_dim: K.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.head_dim))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1)


class RebasedFeatureMap(nn.Module):
    """Monomials of degree 2 of ``y = γ ⊙ LayerNorm(x) + β``, so that ``φ(q)·φ(k) = (y_q·y_k)² / K``, F = K (K + 1) / 2:
    ReBased's learnable quadratic kernel (Aksenov et al. 2024, arXiv 2402.10644). γ starts at 1, β at 0.

    Args:
        num_heads: heads H, each with its own γ and β ``[K]``.
        head_dim: K.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.gamma = nn.Parameter(torch.ones(num_heads, 1, head_dim))
        self.beta = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.gamma.fill_(1)
            self.beta.zero_()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:]) * self.gamma + self.beta
        i, j = torch.triu_indices(self.head_dim, self.head_dim, device=x.device)
        multiplicity = 2.0 - (i == j).to(y.dtype)
        features: Tensor = y[..., i] * y[..., j] * (multiplicity / self.head_dim).sqrt()
        return features
