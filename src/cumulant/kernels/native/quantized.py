"""Weights from codes of 8 and 4 bits, on the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized import BITS, groups_of, row_bytes
from .library import Quantized, call_library, instruction_set_number, require, thread_count


def dequantize(
    codes: Tensor, scales: Tensor, bits: int, k: int, out: Tensor | None = None
) -> Tensor:
    """The weights ``[n, k]`` of ``codes [n, bytes]`` and ``scales [n, groups]``.

    out: contiguous memory for them.
    """
    n = codes.shape[0]
    require(bits in BITS, "bits", BITS, bits)
    _require_matrix("codes", codes, (n, row_bytes(k, bits)), torch.uint8)
    _require_matrix("scales", scales, (n, groups_of(k)), torch.float32)
    out = torch.empty(n, k) if out is None else out
    _require_matrix("out", out, (n, k), torch.float32)
    arguments = Quantized(
        n, k, bits, thread_count(n * k), instruction_set_number(),
        codes.data_ptr(), scales.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    call_library("cumulant_decode", arguments)
    return out


def _require_matrix(name: str, x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    fits = x.shape == shape and x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"
    require(fits, name, f"contiguous {dtype} {list(shape)}", f"{x.dtype} {list(x.shape)}")
