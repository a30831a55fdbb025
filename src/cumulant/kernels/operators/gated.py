"""The operator of gated attention."""

from __future__ import annotations

import torch

from ..spec import GatedInputs, GatedOutputs, GatedSpec
from ..transforms import needs_formula
from .operator import Operator

OPERATOR = Operator(
    "gated_attention",
    "gated",
    GatedInputs,
    GatedOutputs,
    GatedSpec,
    differentiable=("query", "key", "value", "bias"),
)


def call_gated(impl: str, inputs: GatedInputs, spec: GatedSpec) -> GatedOutputs:
    """The output by implementation `impl`, or by a formula where derivatives need one."""
    if needs_formula(torch.compiler.is_compiling()):
        from ..differentiable.gated import attention as formula

        return formula(inputs, spec)
    seed = torch.randint(2**62, (1,)) if spec.dropout_p else None
    return OPERATOR(impl, inputs._replace(seed=seed), spec)
