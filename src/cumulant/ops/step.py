"""Steps: one token through a whole module in one native call, for decoding.

A module writes its work down once, as a `Program`; see `cumulant.nn.step`, which knows when
programs may run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.native.program import Program, Unsuitable, Vector
from ..kernels.product import is_plain_call
from .dispatch import native_by_default

__all__ = ["MOST_ROWS", "Program", "Unsuitable", "Vector", "may_step"]

MOST_ROWS = 16  # above, PyTorch's matrix products are the faster ones


def may_step(x: Tensor) -> bool:
    """Whether ``x [B, 1, D]`` is a token that a program may take: few rows of fp32 on a CPU, in a
    plain call.
    """
    return (
        is_plain_call(x)
        and x.dim() == 3
        and x.shape[1] == 1
        and 0 < x.shape[0] <= MOST_ROWS
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and native_by_default(x)
    )
