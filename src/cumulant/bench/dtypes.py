"""The dtypes that measurements know, with the colour of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .reports.palette import BLACK, BLUE, GREEN, VERMILION


@dataclass(frozen=True)
class Dtype:
    """A dtype of PyTorch and its colour in pictures."""

    torch: torch.dtype
    colour: str


DTYPES = {
    "fp32": Dtype(torch.float32, BLUE.colour),
    "bf16": Dtype(torch.bfloat16, VERMILION.colour),
    "fp16": Dtype(torch.float16, GREEN.colour),
    "fp64": Dtype(torch.float64, BLACK.colour),
}


def require_dtype(name: str) -> None:
    """Refuse a name that is not in the table."""
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
