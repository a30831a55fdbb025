"""What `cumulant bench accuracy` measures: operations and their implementations.

A new operation is one entry of `OPERATIONS`, a new implementation one of `_IMPLEMENTATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.dispatch import native_obstacle
from ...ops.elita import elita_attention
from ...ops.linear import linear_attention
from ...ops.mixed_chunk import mixed_chunk_attention
from ...ops.taylor import taylor_attention

Operation = Callable[..., Any]
LAST = 1024  # outputs that are compared, the last ones
QUADRATIC = 4096  # tokens up to which the reference, with T × T weights, is run
STEPWISE = 16384  # tokens up to which single steps are run


def _taylor(order: int) -> Operation:
    return lambda q, k, v, **options: taylor_attention(q, k, v, order, is_causal=True, **options)


def _elita(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return elita_attention(
        k[..., 0].contiguous(), q[..., 0].contiguous(), q[..., 1].contiguous(), v, **options
    )


def _mixed_chunk(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    options = {"group_size": 64, "is_causal": True, **options}
    return mixed_chunk_attention(q, k, q.flip(-1), k.flip(-1), v, **options)


# each takes query, key and value of one shape, and the options `impl`, `state` and `return_state`
OPERATIONS: dict[str, Operation] = {
    "linear": lambda q, k, v, **options: linear_attention(q, k, v, is_causal=True, **options),
    "taylor-2": _taylor(2),
    "taylor-3": _taylor(3),
    "elita": _elita,
    "mixed_chunk": _mixed_chunk,
}


@dataclass(frozen=True)
class Implementation:
    """A method to compute an operation.

    name: in rows. label, marker: in pictures. can_run: whether it can run on these inputs.
    run: returns the last `LAST` outputs at least.
    """

    name: str
    label: str
    marker: str
    can_run: Callable[[list[Tensor]], bool]
    run: Callable[[Operation, list[Tensor]], Tensor]


def _by_implementation(impl: str) -> Callable[[Operation, list[Tensor]], Tensor]:
    def run(operation: Operation, inputs: list[Tensor]) -> Tensor:
        out: Tensor = operation(*inputs, impl=impl)
        return out

    return run


def _in_steps(operation: Operation, inputs: list[Tensor]) -> Tensor:
    state, outs = None, []
    for t in range(inputs[0].shape[2]):
        out, state = operation(
            *(x[:, :, t : t + 1] for x in inputs), state=state, return_state=True
        )
        outs.append(out)
    return torch.cat(outs[-LAST:], 2)


_IMPLEMENTATIONS = (
    Implementation(
        "reference",
        "reference",
        "x",
        lambda inputs: inputs[0].shape[2] <= QUADRATIC,
        _by_implementation("reference"),
    ),
    Implementation("torch", "torch", "s", lambda inputs: True, _by_implementation("torch")),
    Implementation(
        "native",
        "native",
        "o",
        lambda inputs: not native_obstacle(inputs[0]),
        _by_implementation("native"),
    ),
    Implementation(
        "one token at a time",
        "steps",
        "^",
        lambda inputs: inputs[0].shape[2] <= STEPWISE,
        _in_steps,
    ),
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in _IMPLEMENTATIONS}
