"""Steps of decoding: one token through a whole module in one native call.

A module describes its work once, as a `Program`. `cumulant.nn.step` decides when programs may run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.native import library
from ..kernels.native.bound_program import BoundProgram
from ..kernels.native.program import DTYPES, Program, Unsuitable, Vector
from ..kernels.native.row_program import RowProgram
from ..kernels.product import is_plain_call
from .dispatch import native_by_default

__all__ = [
    "MOST_ROWS",
    "BoundProgram",
    "Program",
    "RowProgram",
    "Unsuitable",
    "Vector",
    "instruction_set",
    "may_step",
]

MOST_ROWS = 16  # with more rows PyTorch's matrix products are faster


def instruction_set() -> str:
    """The instruction set of the native kernels; empty without them."""
    try:
        return library.instruction_set_name()
    except RuntimeError:
        return ""


def may_step(x: Tensor) -> bool:
    """Whether a program may take ``x [B, 1, D]``: few rows on a CPU, in a plain call."""
    return (
        is_plain_call(x)
        and x.dim() == 3
        and x.shape[1] == 1
        and 0 < x.shape[0] <= MOST_ROWS
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and native_by_default(x)
    )
