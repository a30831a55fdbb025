"""Linear layers and embeddings whose weights have 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.quantized import QuantizedMatrix, check_bits, quantize
from ..ops.step import Vector
from .checks import check_counts, check_features
from .step import StepBuilder, known_to_programs, step


class _Quantized(nn.Module):
    """A matrix ``[rows, columns]``: the parameters `weight`, its codes, and `scales`."""

    bits: int

    def _allocate(self, rows: int, columns: int, bits: int) -> None:
        self.bits = check_bits(bits)
        self._hold(QuantizedMatrix.zeros(rows, columns, bits))

    def _hold(self, matrix: QuantizedMatrix) -> None:
        self.weight = nn.Parameter(matrix.codes, requires_grad=False)
        self.scales = nn.Parameter(matrix.scales, requires_grad=False)

    def matrix(self, columns: int) -> QuantizedMatrix:
        return QuantizedMatrix(self.weight, self.scales, self.bits, columns)


@known_to_programs
class QuantizedLinear(_Quantized):
    """``y = x Wᵀ + b`` with W in 8 or 4 bits, in groups of 64 weights with an fp32 scale each.

    The format is in `cumulant.kernels.quantized`. Arithmetic is fp32, except that inputs are
    rounded to 16 bits, in groups of 64, on processors with AVX-512 VNNI. The layer cannot be
    trained.

    Args:
        in_features, out_features: as for `torch.nn.Linear`.
        bits: 8 or 4.
        bias: add b.
    """

    def __init__(self, in_features: int, out_features: int, *, bits: int, bias: bool = True):
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(out_features, in_features, bits)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, layer: nn.Linear, bits: int) -> QuantizedLinear:
        """The layer with its weights quantised, for the least squared error of each group."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, bits=bits, bias=False)
        made._hold(quantize(layer.weight, bits))
        made.bias = layer.bias
        return made

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits},"
            f" bias={self.bias is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` -> ``[..., out_features]`` in the dtype of x, with K = in_features."""
        check_features(x, self, self.in_features, "[..., K]")
        stepped = step(self, x)
        if stepped is not None:
            return stepped[0]
        return self.matrix(self.in_features).multiply(x, self.bias)

    def emit_matrix(self, builder: StepBuilder, x: Vector, to: Vector | None, add: bool) -> Vector:
        """See `cumulant.nn.step.StepBuilder.emit_projection`."""
        builder.rely_on(self)
        return builder.program.quantized_matrix(
            x, self.weight, self.scales, self.bits, self.bias, to, add
        )

    def emit_step(self, builder: StepBuilder, x: Vector, residual: Vector | None) -> Vector:
        """See `cumulant.nn.step.EmitsStep`."""
        return self.emit_matrix(builder, x, residual, add=residual is not None)


class QuantizedEmbedding(_Quantized):
    """`torch.nn.Embedding` with its weights in 8 or 4 bits; see `QuantizedLinear`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, bits: int):
        super().__init__()
        check_counts(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._allocate(num_embeddings, embedding_dim, bits)

    @classmethod
    def from_embedding(cls, layer: nn.Embedding, bits: int) -> QuantizedEmbedding:
        """The layer with its weights quantised."""
        with torch.device("meta"):
            made = cls(layer.num_embeddings, layer.embedding_dim, bits=bits)
        made._hold(quantize(layer.weight, bits))
        return made

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` ids -> ``[..., embedding_dim]`` in fp32."""
        rows = self.matrix(self.embedding_dim).rows(ids.flatten())
        return rows.dequantize().view(*ids.shape, self.embedding_dim)
