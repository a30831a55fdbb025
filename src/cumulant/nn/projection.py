"""The linear layer of all modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.project import project


class Projection(nn.Linear):
    """`torch.nn.Linear`, up to twice as fast on CPUs where PyTorch's own matrix products are slow."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return project(input, self.weight, self.bias)
