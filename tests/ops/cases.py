"""Rows of the test matrix: every operation with its variants, and random inputs for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import cumulant as cm

from .interpreter import HAS_TRITON

IMPLEMENTATIONS = ("reference", "torch", "native", *(("triton",) if HAS_TRITON else ()))
CHUNK = 16  # the tests' chunk, so that short sequences span several

# Bound on ||out - exact|| / ||exact||, where exact is the float64 formula on the same (rounded)
# inputs: a few times the error of the plain quadratic form in that dtype, which is 2e-16, 1.4e-7,
# 1.6e-3 and 2e-4. It may never be 20 times larger (test_tolerances_are_tight). Tests that compare
# two float64 computations of longer chains give a factor.
TOLERANCE = {
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}

# Relative error of one rounding of random numbers, and bound on the error of outputs and gradients,
# as a multiple of the error that the plain quadratic form in that dtype has itself
# (test_gradient_errors).
ROUNDING = {torch.float32: 1e-7, torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4}
GRADIENT_TOLERANCE = {torch.float32: 4.0, torch.bfloat16: 1.5, torch.float16: 1.5}


@dataclass(frozen=True)
class Case:
    """One variant of an operation: how to call it, and which rows of the matrix it has."""

    name: str
    op: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    signed: bool = False  # weights of both signs: draw positive q and k, lest denominators vanish
    cross: bool = True  # more or fewer keys than queries, and a context's state
    masked_queries: bool = True  # what is masked still asks; else it does not exist
    packed_states: bool = True
    biased: bool = False
    bidirectional: bool = True
    decays: bool = False  # log decays that are functions of the keys

    @property
    def implementations(self) -> tuple[str, ...]:
        lacking = ["native"] if self.op is cm.gated_attention else []
        if self.name not in TRITON:
            lacking.append("triton")
        return tuple(name for name in IMPLEMENTATIONS if name not in lacking)

    def inputs(
        self, *args: Any, requires_grad: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs(*args, **kwargs)
        if self.signed:
            q, k = q.abs() + 0.1, k.abs() + 0.1
        return tuple(x.requires_grad_(requires_grad) for x in (q, k, v))  # type: ignore[return-value]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        if (
            self.op is cm.mixed_chunk_attention
        ):  # linear queries and keys that are functions of the quadratic ones
            return self.op(q, k, *linear_part(q, k), v, **self.bias(q, 8), **self.options, **kwargs)
        if self.op is cm.elita_attention:
            assert kwargs.pop("is_causal")
            return self.op(*elita_logits(self, q, k), v, **kwargs)
        if self.op is cm.gated_attention:
            past = 0 if kwargs.get("state") is None else kwargs["state"].key.shape[2]
            bias = self.bias(q, q.shape[2] + past)
            if bias and past:
                bias["bias"] = bias["bias"][:, past:]
            return self.op(q, k, v, **bias, **self.options, **kwargs)
        if self.decays:
            kwargs["log_decay"] = log_decays(k)
        return self.op(q, k, v, **self.options, **kwargs)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, **kwargs: Any
    ) -> tuple[Tensor, cm.State | None]:
        """Output and state; None for a state where there is none."""
        if kwargs.get("cu_seqlens") is not None and not self.packed_states:
            kwargs.pop("state", None)
            return self(q, k, v, is_causal=is_causal, **kwargs), None
        both_ways = self.op in (cm.linear_attention, cm.taylor_attention) and not self.decays
        if is_causal or both_ways:
            return self(q, k, v, is_causal=is_causal, return_state=True, **kwargs)
        kwargs.pop("state", None)
        return self(q, k, v, is_causal=is_causal, **kwargs), None

    def bias(self, q: Tensor, size: int) -> dict[str, Tensor]:
        """A bias by distance, different for each head, if this variant has one."""
        if not self.biased:
            return {}
        distance = torch.arange(size) - torch.arange(size)[:, None]
        by_head = torch.arange(1, q.shape[1] + 1)[:, None, None] * torch.cos(distance * 1.3)
        return {"bias": 0.2 * by_head.to(q)}


def linear_part(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Linear queries and keys from the quadratic ones, exact in every dtype."""
    return q.flip(-1) * 0.5, k.roll(1, -1) * -2


def elita_logits(case: Case, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of key, query and token itself, exact in every dtype."""
    own = q[..., -1] * 2
    return (
        k[..., 0] * 2,
        q[..., 0],
        own if case.options["own"] else own.masked_fill(own > 0, -math.inf),
    )


def log_decays(k: Tensor) -> Tensor:
    """Log decays ``[B, G, S]`` from nearly 0 to -6, exact in every dtype."""
    return k[..., 0].to(torch.promote_types(k.dtype, torch.float32)).abs() * -2


def squared(x: Tensor) -> Tensor:
    return torch.cat((x * x, x.abs()), -1)


# Cases of the Triton kernels.
TRITON = (
    "taylor-1",
    "taylor-2",
    "taylor-2-scaled",
    "taylor-2-no-constant",
    "taylor-2-decay",
    "linear-elu",
    "linear-elu-decay",
    "linear-relu",
    "linear-identity",
    "linear-sums-decay",
    "linear-softmax",
    "linear-softmax-raw",
    "linear-callable",
    "linear-callable-decay",
    "elita-own",
    "elita-partly-own",
    "mixed-relu2",
    "mixed-laplace",
    "mixed-bias",
    "mixed-unreduced",
    "mixed-one",
    "mixed-wide",
    "linear-pair",
)

SUMS = {"feature_map": "identity", "normalize": False}

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
    Case("linear-identity", cm.linear_attention, SUMS),
    Case("linear-softmax", cm.linear_attention, {"feature_map": "softmax"}),
    *(
        Case(name, op, options, cross=False, bidirectional=False, decays=True)
        for name, op, options in (
            ("taylor-2-decay", cm.taylor_attention, {}),
            ("linear-elu-decay", cm.linear_attention, {"scale": 0.6}),
            ("linear-sums-decay", cm.linear_attention, SUMS),
            ("linear-callable-decay", cm.linear_attention, {"feature_map": squared}),
        )
    ),
    Case("linear-softmax-raw", cm.linear_attention, {"feature_map": "softmax", "normalize": False}),
    Case("linear-callable", cm.linear_attention, {"feature_map": squared}),
    *(
        Case(
            f"gated-{name}",
            cm.gated_attention,
            options,
            cross=cross,
            packed_states=False,
            biased=biased,
        )
        for name, options, cross, biased in (
            ("relu2", {}, True, False),
            ("laplace", {"activation": "laplace"}, True, False),
            ("fixed", {"length_scale": 7.0}, True, False),
            ("bias", {"activation": "laplace"}, False, True),
        )
    ),
    *(
        Case(
            f"mixed-{name}",
            cm.mixed_chunk_attention,
            options,
            cross=False,
            masked_queries=False,
            biased=biased,
        )
        for name, options, biased in (
            ("relu2", {"group_size": 8}, False),
            ("laplace", {"group_size": 5, "activation": "laplace"}, False),
            ("bias", {"group_size": 8, "activation": "laplace"}, True),
            ("unreduced", {"group_size": 8, "reduce_group_non_causal_attn": False}, True),
            ("one", {"group_size": 1}, False),
            ("wide", {"group_size": 64}, False),
        )
    ),
    *(
        Case(f"elita-{name}", cm.elita_attention, {"own": own}, cross=False, bidirectional=False)
        for name, own in (("own", True), ("partly-own", False))
    ),
    Case(
        "linear-pair",
        cm.linear_attention,
        {"feature_map": (torch.exp, torch.nn.functional.softplus)},
    ),
]

# Sums that do not cancel, for tests of accuracy and of long runs.
POSITIVE = [
    c
    for c in CASES
    if c.name in ("taylor-2", "taylor-2-scaled", "linear-elu", "linear-softmax", "elita-own")
]

# And those without a quotient, whose errors are those of their products.
GATED = [
    c for c in CASES if c.name in ("gated-laplace", "gated-fixed", "mixed-relu2", "mixed-bias")
]
FIXED = [
    c for c in CASES if c.name in ("mixed-relu2", "mixed-laplace")
]  # states of fixed size among them
CROSS = [c for c in CASES if c.cross]

# The bias of gated attention belongs to slots, masked or not.
BY_TOKEN = [c for c in CASES if not (c.op is cm.gated_attention and c.biased)]


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
    """The error relative to the whole tensor's size, or infinity if a number is not finite."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shapes differ: {list(actual.shape)} and {list(exact.shape)}")
    if actual.numel() == 0:
        return 0.0
    actual, exact = actual.detach(), exact.detach()
    infinite = actual.isinf() & (actual == exact)  # a sum over nothing, as a logarithm
    actual, exact = actual.masked_fill(infinite, 0), exact.masked_fill(infinite, 0)
    if not torch.isfinite(actual).all():
        return math.inf
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def assert_close(actual: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """The error is within the table's tolerance for `actual`'s dtype."""
    bound = TOLERANCE[actual.dtype] * factor
    if exact.numel() and not exact.any():
        assert not actual.any()
        return
    found = error(actual, exact)
    assert found <= bound, f"error {found:.2e} above {bound:.0e} for {actual.dtype}"


def tensors_of(state: cm.State | None) -> list[Tensor]:
    return [] if state is None else list(state.tensors().values())


def sums_of(state: cm.State | None) -> list[Tensor]:
    """The tensors of a state that a gradient can flow through."""
    return [x for x in tensors_of(state) if x.is_floating_point()]


by_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
by_fast_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS[1:])  # all but the reference
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
by_token = pytest.mark.parametrize("case", BY_TOKEN, ids=lambda c: c.name)
by_positive = pytest.mark.parametrize("case", POSITIVE, ids=lambda c: c.name)


def forms(cases: list[Case]) -> Any:
    """Each case, causal and, where it has that form, in both directions."""
    found = [
        (c, is_causal) for c in cases for is_causal in (True, False) if is_causal or c.bidirectional
    ]
    names = [f"{c.name}-{'causal' if is_causal else 'bidirectional'}" for c, is_causal in found]
    return pytest.mark.parametrize(("case", "is_causal"), found, ids=names)


by_form = forms(CASES)


def gradients(out: Any, wrt: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of a fixed nonlinear function of outputs (and states)."""
    leaves = [out] if isinstance(out, Tensor) else [out[0], *sums_of(out[1])]
    leaves = [x.masked_fill(x.isinf(), 0) for x in leaves]  # logarithms of sums over nothing
    loss = sum(
        (x.double().sin() * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in leaves
    )
    found = torch.autograd.grad(loss, wrt, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wrt)]
