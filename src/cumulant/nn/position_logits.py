"""Position logits of ELiTA, sums of learned sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .checks import check_counts, check_positions
from .step import known_to_programs


@known_to_programs
class SinusoidalLogits(nn.Module):
    """Logits of each position, ``P₁(j)`` for keys and ``P₂(i)`` for queries, for every head::

        P_n(j) = Σ_m c_m sin(a_nm · τ_j + b_nm),   τ_j = time · j / horizon

    Keys and queries have separate frequencies (a₁, a₂) and phases (b₁, b₂), but the same amplitudes
    c. All are learned. Position adds ``P₂(i) + P₁(j)`` to the logit of query i and key j.

    Positions beyond the horizon continue the same sines, at values of τ above `time`. Training on
    up to `horizon` tokens has not seen those. To read a longer text within the trained range, raise
    `horizon` or lower `time`, which moves positions closer together.

    Source: Sharma 2023, ELiTA, p₁ and p₂.

    Args:
        num_heads: heads H.
        features: sines m of each logit.
        horizon: position j at which τ equals `time`; above 0.
        time: τ at the horizon.
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    c: Tensor

    def __init__(
        self, num_heads: int, features: int = 16, *, horizon: float = 1024, time: float = 1.0
    ):
        super().__init__()
        check_counts(num_heads=num_heads, features=features)
        check_horizon(horizon)
        if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time):
            raise ValueError(f"time: expected a finite number, got {time!r}")
        self.num_heads, self.features, self.horizon, self.time = num_heads, features, horizon, time
        for name, value in self.initial().items():
            setattr(self, name, nn.Parameter(value))

    def initial(self) -> dict[str, Tensor]:
        """The initial values ``[H, M]`` of each parameter, from -0.05 to 0.05 as published."""
        shape = self.num_heads, self.features
        return {
            name: torch.empty(shape).uniform_(-0.05, 0.05) for name in ("a1", "b1", "a2", "b2", "c")
        }

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.features}, horizon={self.horizon}, time={self.time}"

    def forward(
        self, position: Tensor, horizon: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]:
        """``position [...]`` (integers) -> P₁ and P₂ ``[..., H]`` in fp32.

        `horizon` replaces the module's own.
        """
        check_positions(position, "[...]")
        horizon = self.horizon if horizon is None else horizon
        if not isinstance(horizon, Tensor):
            check_horizon(horizon)
        tau = (self.time * position.double() / horizon).to(
            torch.promote_types(self.c.dtype, torch.float32)
        )
        tau = tau[..., None, None]
        with torch.autocast(position.device.type, enabled=False):
            return (
                ((tau * self.a1 + self.b1).sin() * self.c).sum(-1),
                ((tau * self.a2 + self.b2).sin() * self.c).sum(-1),
            )


def check_horizon(horizon: float) -> None:
    if (
        isinstance(horizon, bool)
        or not isinstance(horizon, int | float)
        or not 0 < horizon < float("inf")
    ):
        raise ValueError(f"horizon: expected a number of positions above 0, got {horizon!r}")
