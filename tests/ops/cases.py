"""Rows of the test matrix: every (operation, variant), and an oracle for each, written from the formula alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import cumulant as cm

IMPLEMENTATIONS = ("reference", "torch")
CHUNK = 16  # the tests' chunk, so that short sequences span several

# Bound on ||out - exact|| / ||exact||, where exact is the float64 formula on the same (rounded) inputs: a few times the
# error of the plain quadratic form in that dtype, which is 2e-16, 1.4e-7, 1.6e-3 and 2e-4. It may never be 20 times
# larger (test_tolerances_are_tight). Tests that compare two float64 computations of longer chains give a factor.
TOLERANCE = {
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


@dataclass(frozen=True)
class Case:
    """One variant: how to call it, and the weight of query q on key k by which its oracle is built."""

    name: str
    op: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    signed: bool = False  # weights of both signs: draw positive q and k, lest denominators vanish

    def inputs(self, *args: Any, requires_grad: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs(*args, **kwargs)
        if self.signed:
            q, k = q.abs() + 0.1, k.abs() + 0.1
        return tuple(x.requires_grad_(requires_grad) for x in (q, k, v))  # type: ignore[return-value]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        return self.op(q, k, v, **self.options, **kwargs)


def squared(x: Tensor) -> Tensor:
    return torch.cat((x * x, x.abs()), -1)


CASES = [
    Case("taylor-1", cm.taylor_attention, {"order": 1}, signed=True),
    Case("taylor-2", cm.taylor_attention),
    Case("taylor-2-scaled", cm.taylor_attention, {"scale": 0.7}),
    Case("taylor-2-no-constant", cm.taylor_attention, {"constant_term": False}, signed=True),
    Case("taylor-3", cm.taylor_attention, {"order": 3}, signed=True),
    Case("taylor-4", cm.taylor_attention, {"order": 4}),
    Case("taylor-6", cm.taylor_attention, {"order": 6, "scale": 0.3}),
    Case("linear-elu", cm.linear_attention, {"scale": 0.6}),
    Case("linear-relu", cm.linear_attention, {"feature_map": "relu"}),
    Case("linear-identity", cm.linear_attention, {"feature_map": "identity", "normalize": False}),
    Case("linear-softmax", cm.linear_attention, {"feature_map": "softmax"}),
    Case("linear-softmax-raw", cm.linear_attention, {"feature_map": "softmax", "normalize": False}),
    Case("linear-callable", cm.linear_attention, {"feature_map": squared}),
    Case("linear-pair", cm.linear_attention, {"feature_map": (torch.exp, torch.nn.functional.softplus)}),
]
# Sums that do not cancel, for tests of accuracy and of long runs.
POSITIVE = [c for c in CASES if c.name in ("taylor-2", "taylor-2-scaled", "linear-elu", "linear-softmax")]


def oracle(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The definition, one batch row, head and query at a time, over the keys it may see."""
    q, k, v = q.double(), k.double(), v.double()
    H, G = q.shape[1], k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(H):
            keys, values = k[b, h // (H // G)], v[b, h // (H // G)]
            for i in range(q.shape[2]):
                seen = torch.ones(len(keys), dtype=torch.bool) if key_mask is None else key_mask[b].clone()
                if is_causal:
                    seen[i + 1 :] = False
                if seen.any():
                    out[b, h, i] = _attend(case, q[b, h, i], keys[seen], values[seen])
    return out


def _attend(case: Case, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    options = case.options
    if case.op is cm.taylor_attention:
        x = (keys @ q) * options.get("scale", 1 / math.sqrt(len(q)))
        terms = [x**p / math.factorial(p) for p in range(options.get("order", 2) + 1)]
        weights = torch.stack(terms if options.get("constant_term", True) else terms[1:]).sum(0)
        return weights @ values / weights.sum()
    q = q * options.get("scale", 1.0)
    name = options.get("feature_map", "elu")
    if name == "softmax" and not options.get("normalize", True):
        return torch.softmax(q, -1) @ (keys.exp().T @ values)
    if name == "softmax":  # a softmax over tokens in each feature, mixed by the query's softmax over features
        return torch.softmax(q, -1) @ (torch.softmax(keys, 0).T @ values)
    phi = {
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda x: x.clamp(min=0),
        "identity": lambda x: x,
    }.get(name, name)
    phi_q, phi_k = phi if isinstance(phi, tuple) else (phi, phi)
    weights = phi_k(keys) @ phi_q(q)
    total = weights.sum()
    if options.get("normalize", True):
        return weights @ values / total if total != 0 else torch.zeros_like(values[0])
    return weights @ values


def inputs(
    B: int = 2,
    H: int = 4,
    T: int = 37,
    K: int = 5,
    V: int = 3,
    *,
    G: int = 2,
    S: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, V))
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative to the whole tensor's size; infinite where anything is not finite."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shapes differ: {list(actual.shape)} and {list(exact.shape)}")
    if actual.numel() == 0:
        return 0.0
    if not torch.isfinite(actual).all():
        return math.inf
    actual, exact = actual.detach(), exact.detach()
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def assert_close(actual: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """Within the table's tolerance for `actual`'s dtype."""
    bound = TOLERANCE[actual.dtype] * factor
    if exact.numel() and not exact.any():
        assert not actual.any()
        return
    found = error(actual, exact)
    assert found <= bound, f"error {found:.2e} above {bound:.0e} for {actual.dtype}"


def tensors_of(state: cm.LinearState) -> list[Tensor]:
    return list(state.tensors().values())
