"""Errors for argument names of other libraries, which say what the argument is called here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_MASK = (
    "pass key_mask [B, S] (boolean, True = attend), or is_causal=True; queries cannot have masks of"
    " their own"
)
HINTS = {
    **dict.fromkeys(("attn_mask", "attention_mask", "mask", "key_padding_mask"), _MASK),
    "causal": "pass is_causal=True",
    **dict.fromkeys(
        ("dropout_p", "dropout"),
        "attention weights are not formed, so none can be dropped; leave it out",
    ),
    **dict.fromkeys(("softmax_scale", "sm_scale"), "pass scale"),
    **dict.fromkeys(("initial_state", "past"), "pass state, from a call with return_state=True"),
    "output_final_state": "pass return_state=True",
    "enable_gqa": "fewer key/value heads than query heads need no flag; leave it out",
}


def hint_at_names(op: Callable[P, R]) -> Callable[P, R]:
    """The operation, whose error for another library's argument name names the argument here."""
    parameters = inspect.signature(op).parameters
    hints = {name: hint for name, hint in HINTS.items() if name not in parameters}

    @wraps(op)
    def checked_call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return op(*args, **kwargs)
        except TypeError:
            for name in kwargs:  # looked for only now, as this costs time
                if name in hints:
                    raise TypeError(
                        f"{op.__name__}() got an unexpected keyword argument {name!r}:"
                        f" {hints[name]}"
                    ) from None
            raise

    return checked_call
