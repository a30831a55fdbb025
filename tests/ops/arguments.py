"""Arguments by name, for tests of what operations refuse."""

import torch

from .cases import inputs, linear_part


def wide(*shape, dtype=torch.float64):
    """Zeros in float64, the dtype of the other arguments."""
    return torch.zeros(shape, dtype=dtype)


def long(*shape):
    """Zeros in int64, which no operation takes."""
    return torch.zeros(shape, dtype=torch.int64)


def mixed_arguments(T=37):
    q, k, v = inputs(T=T)
    names = ("quad_query", "quad_key", "lin_query", "lin_key", "value")
    return dict(zip(names, (q, k, *linear_part(q, k), v)))


def elita_arguments(T=37):
    q, k, v = inputs(T=T)
    return {"key_logit": k[..., 0], "query_logit": q[..., 0], "self_logit": q[..., 1], "value": v}
