"""Matrices of 8 and 4 bits: their format, and how numbers become codes and codes numbers.

A row is cut into groups of 64 weights, the last one filled up with zeros. Each group has an fp32
scale, and a weight is ``(code - offset) · scale``:

- 8 bits: the offset is 128, and a group is 64 bytes.
- 4 bits: the offset is 8, and a group is 32 bytes. Byte i has code i in its low bits, and code
  32 + i in its high bits.

So a matrix ``[n, k]`` is ``codes [n, bytes]`` and ``scales [n, groups]``, 8.5 or 4.5 bits a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (8, 4)
GROUP = 64
ROWS = 4096  # groups that are quantised together, which stay in cache
# The largest number of a group would become one of these codes, of either sign, whichever errs
# least. Codes beyond the last one are cut off.
LARGEST = {8: tuple(112 + i / 2 for i in range(40)), 4: tuple(7 + i / 8 for i in range(32))}


def groups_of(k: int) -> int:
    """Groups of a row of k weights."""
    return -(-k // GROUP)


def row_bytes(k: int, bits: int) -> int:
    """Bytes of the codes of a row of k weights."""
    return groups_of(k) * GROUP * bits // 8


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``weight [n, k]``, chosen for the least squared error of each group.

    For fixed codes c of the weights w the best scale is ``Σ w c / Σ c²``. Codes come from the
    scales that make the largest weight of a group one of `LARGEST`.
    """
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.detach().float(), (0, groups_of(k) * GROUP - k))
    found = [_quantize_groups(part, bits) for part in groups.reshape(-1, GROUP).split(ROWS)]
    codes = torch.cat([codes for codes, _ in found]) if found else groups.new_empty(0, GROUP)
    scales = torch.cat([scales for _, scales in found]) if found else groups.new_empty(0)
    packed = (codes + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        packed = packed[:, : GROUP // 2] | packed[:, GROUP // 2 :] << 4
    return packed.reshape(n, row_bytes(k, bits)), scales.reshape(n, groups_of(k))


def _quantize_groups(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes ``[n, 64]`` from -2^(bits-1), as floats, and scales ``[n]``."""
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, 1 / largest)
    best = w.new_full((w.shape[0], 1), -1.0)
    codes, scales = torch.zeros_like(w), torch.zeros_like(best)
    for limit in LARGEST[bits]:
        for sign in (1, -1):
            c = (w * (inverse * (sign * limit))).round_().clamp_(least, most)
            product, square = (w * c).sum(1, keepdim=True), (c * c).sum(1, keepdim=True)
            gain = product * product / square.clamp(min=1)  # by how much the error is below Σ w²
            better = gain > best
            best = torch.where(better, gain, best)
            codes = torch.where(better, c, codes)
            scales = torch.where(better, product / square.clamp(min=1), scales)
    return codes, scales[:, 0]


def dequantize(codes: Tensor, scales: Tensor, bits: int, k: int) -> Tensor:
    """The weights ``[n, k]`` in fp32."""
    n, groups = scales.shape
    parts = codes.view(n, groups, -1)
    if bits == 4:
        parts = torch.cat((parts & 15, parts >> 4), -1)
    weights = (parts.float() - (1 << (bits - 1))) * scales[..., None]
    return weights.flatten(1)[:, :k]
