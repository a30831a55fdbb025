"""Several queries and keys from one projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_counts, check_features
from .step import known_to_programs


@known_to_programs
class OffsetScale(nn.Module):
    """``x ⊙ gamma_h + beta_h`` for each of H uses: queries and keys from one projection.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time", section 2.

    Args:
        dim: channels K.
        uses: number H of queries and keys.
    """

    def __init__(self, dim: int, uses: int):
        super().__init__()
        check_counts(dim=dim, uses=uses)
        self.gamma = nn.Parameter(torch.empty(uses, dim))
        self.beta = nn.Parameter(torch.empty(uses, dim))
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, K]`` -> ``[B, H, T, K]``."""
        check_features(x, self, self.gamma.shape[1], "[B, T, K]")
        gamma, beta = self.gamma.to(x.dtype)[:, None], self.beta.to(x.dtype)[:, None]
        return torch.addcmul(beta, x[:, None], gamma)
