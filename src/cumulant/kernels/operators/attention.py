"""The operator of linear and Taylor attention."""

from __future__ import annotations

import torch

from ..spec import AttentionInputs, AttentionOutputs, AttentionSpec
from ..transforms import needs_formula
from .operator import Operator

OPERATOR = Operator(
    "attention",
    "attention",
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    differentiable=("query", "key", "value", "numerator", "denominator", "log_decay"),
    carriers=("out", "final_numerator", "final_denominator"),
    saved_outputs=AttentionOutputs._fields,
)


def call_attention(impl: str, inputs: AttentionInputs, spec: AttentionSpec) -> AttentionOutputs:
    """The outputs by implementation `impl`, or by a formula where derivatives need one."""
    if needs_formula(torch.compiler.is_compiling()):
        from ..differentiable.attention import attention as formula

        return formula(inputs, spec)
    return OPERATOR(impl, inputs, spec)
