"""Matrices of 8 and 4 bits on the native kernels: their weights, and products with many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized import BITS, groups_of, row_bytes
from .library import (
    Quantized,
    QuantizedProduct,
    call_library,
    instruction_set_number,
    require,
    thread_count,
)


def dequantize(codes: Tensor, scales: Tensor, bits: int, k: int) -> Tensor:
    """The weights ``[n, k]`` of ``codes [n, bytes]`` and ``scales [n, groups]``."""
    n = _check_matrix(codes, scales, bits, k)
    out = codes.new_empty(n, k, dtype=torch.float32)
    arguments = Quantized(
        n, k, bits, thread_count(n * k), instruction_set_number(),
        codes.data_ptr(), scales.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    call_library("cumulant_decode", arguments)
    return out


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, bits: int, k: int, bias: Tensor | None = None
) -> Tensor:
    """``x Wᵀ + bias`` for contiguous fp32 ``x [T, k]`` -> ``[T, n]``.

    With AVX-512 VNNI each group of 64 numbers of a token is rounded to 16 bits.
    """
    n, tokens = _check_matrix(codes, scales, bits, k), x.shape[0]
    _require_matrix("x", x, (tokens, k), torch.float32)
    if bias is not None:
        _require_matrix("bias", bias, (n,), torch.float32)
    out = x.new_empty(tokens, n)
    arguments = QuantizedProduct(
        tokens, n, k, bits, thread_count(tokens * n * k), instruction_set_number(),
        codes.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr(),
        x.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    call_library("cumulant_quantized_product", arguments)
    return out


def _check_matrix(codes: Tensor, scales: Tensor, bits: int, k: int) -> int:
    """The rows of a matrix that the C++ can read."""
    n = codes.shape[0]
    require(bits in BITS, "bits", BITS, bits)
    require(k >= 1, "k", "at least 1", k)
    _require_matrix("codes", codes, (n, row_bytes(k, bits)), torch.uint8)
    _require_matrix("scales", scales, (n, groups_of(k)), torch.float32)
    return n


def _require_matrix(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fits = x.shape == shape and x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"
    require(fits, name, f"contiguous {dtype} {list(shape)}", f"{x.dtype} {list(x.shape)}")
