"""The operator of ELiTA's attention."""

from __future__ import annotations

import torch

from ..spec import ElitaInputs, ElitaOutputs, ElitaSpec
from ..transforms import needs_formula
from .operator import Operator

# The backward pass does not read the logits. They are saved so that gradients of gradients are an
# error. Otherwise autograd would take these gradients for zero.
OPERATOR = Operator(
    "elita_attention",
    "elita",
    ElitaInputs,
    ElitaOutputs,
    ElitaSpec,
    differentiable=("key_logit", "query_logit", "self_logit", "value", "log_weight", "mean"),
    carriers=("out", "final_log_weight", "final_mean"),
    saved_outputs=("key_odds", "own_odds", "means", "log_weights"),
)


def call_elita(impl: str, inputs: ElitaInputs, spec: ElitaSpec) -> ElitaOutputs:
    """The outputs by implementation `impl`, or by a formula where derivatives need one."""
    if needs_formula(torch.compiler.is_compiling()):
        from ..differentiable.elita import attention as formula

        return formula(inputs, spec)
    return OPERATOR(impl, inputs, spec)
