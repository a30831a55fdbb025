"""Linear maps by matrices of 8 and 4 bits; see `cumulant.kernels.quantized` for their format."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import quantized as formula
from ..kernels.native import quantized as native
from ..kernels.product import is_plain_call
from ..kernels.quantized import BITS
from .dispatch import native_by_default

__all__ = ["BITS", "QuantizedMatrix", "check_bits", "quantize"]


class QuantizedMatrix(NamedTuple):
    """A matrix ``[n, k]``: ``codes [n, bytes]`` uint8, ``scales [n, groups]`` fp32."""

    codes: Tensor
    scales: Tensor
    bits: int
    k: int

    @classmethod
    def zeros(cls, n: int, k: int, bits: int) -> QuantizedMatrix:
        """A matrix of zeros ``[n, k]``, on the default device."""
        codes = torch.zeros(n, formula.row_bytes(k, bits), dtype=torch.uint8)
        return cls(codes, torch.zeros(n, formula.groups_of(k), dtype=torch.float32), bits, k)

    def rows(self, index: Tensor | slice) -> QuantizedMatrix:
        return self._replace(codes=self.codes[index], scales=self.scales[index])

    def dequantize(self) -> Tensor:
        """The weights ``[n, k]`` in fp32."""
        if not (native_by_default(self.codes) and is_plain_call(self.codes, self.scales)):
            return formula.dequantize(*self)
        return native.dequantize(self.codes.contiguous(), self.scales.contiguous(), *self[2:])

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x Wᵀ + b``: ``x [..., k]`` -> ``[..., n]`` in the dtype of x.

        With AVX-512 VNNI it is a product of integers, as one token's. Gradients of x need all
        weights, and so keep them.
        """
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.multiply(x, bias)
        plain = is_plain_call(x, self.codes, self.scales, bias) and native_by_default(x)
        wanted = x.requires_grad or (bias is not None and bias.requires_grad)
        if not plain or x.dtype == torch.float64 or (wanted and torch.is_grad_enabled()):
            return F.linear(x, self.dequantize().to(x.dtype), bias)
        rows, n = x.reshape(-1, self.k), self.codes.shape[0]
        codes, scales = self.codes.contiguous(), self.scales.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        y = native.multiply(rows.float().contiguous(), codes, scales, *self[2:], bias)
        return y.to(x.dtype).view(*x.shape[:-1], n)


def check_bits(bits: object) -> int:
    """8 or 4, or an error."""
    if isinstance(bits, int) and bits in BITS:
        return bits
    raise ValueError(f"bits: expected 8 or 4, got {bits!r}")


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Every number of the weight has a code."""
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{name}: holds NaN or infinity, which no code stands for")


def quantize(weight: Tensor, bits: int) -> QuantizedMatrix:
    """``weight [n, k]`` in 8 or 4 bits; see `cumulant.kernels.quantized.quantize`."""
    check_bits(bits)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected a matrix [n, k] of floats, got {weight.dtype} {list(weight.shape)}"
        )
    check_weight(weight)
    return QuantizedMatrix(*formula.quantize(weight, bits), bits, weight.shape[1])
