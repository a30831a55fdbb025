"""The operator of mixed chunk attention."""

from __future__ import annotations

import torch

from ..spec import MixedChunkInputs, MixedChunkOutputs, MixedChunkSpec
from ..transforms import needs_formula
from .operator import Operator

OPERATOR = Operator(
    "mixed_chunk_attention",
    "mixed_chunk",
    MixedChunkInputs,
    MixedChunkOutputs,
    MixedChunkSpec,
    differentiable=(
        *("quad_query", "quad_key", "lin_query", "lin_key", "value", "bias"),
        *("numerator", "open_quad_key", "open_lin_key", "open_value"),
    ),
    carriers=MixedChunkOutputs._fields,
)


def call_mixed_chunk(
    impl: str, inputs: MixedChunkInputs, spec: MixedChunkSpec
) -> MixedChunkOutputs:
    """The outputs by implementation `impl`, or by a formula where derivatives need one."""
    if needs_formula(torch.compiler.is_compiling()):
        from ..differentiable.mixed_chunk import attention as formula

        return formula(inputs, spec)
    seed = torch.randint(2**62, (1,)) if spec.dropout_p else None
    return OPERATOR(impl, inputs._replace(seed=seed), spec)
