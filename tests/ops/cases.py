"""Rows of the test matrix: every (operation, variant), and an oracle for each, written from the
formula alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import cumulant as cm

IMPLEMENTATIONS = ("reference", "torch", "native")
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
    """One variant: how to call it, and the weight of query q on key k by which its oracle is
    built.
    """

    name: str
    op: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    signed: bool = False  # weights of both signs: draw positive q and k, lest denominators vanish
    cross: bool = True  # more or fewer keys than queries, and a context's state
    masked_queries: bool = True  # what is masked still asks; else it does not exist
    packed_states: bool = True
    biased: bool = False
    bidirectional: bool = True

    @property
    def implementations(self) -> tuple[str, ...]:
        return IMPLEMENTATIONS[:2] if self.op is cm.gated_attention else IMPLEMENTATIONS

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
        return self.op(q, k, v, **self.options, **kwargs)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, **kwargs: Any
    ) -> tuple[Tensor, cm.State | None]:
        """Output and state; None for a state where there is none."""
        if kwargs.get("cu_seqlens") is not None and not self.packed_states:
            kwargs.pop("state", None)
            return self(q, k, v, is_causal=is_causal, **kwargs), None
        if is_causal or self.op in (cm.linear_attention, cm.taylor_attention):
            return self(q, k, v, is_causal=is_causal, return_state=True, **kwargs)
        kwargs.pop("state", None)
        return self(q, k, v, is_causal=is_causal, **kwargs), None

    def bias(self, q: Tensor, size: int) -> dict[str, Tensor]:
        """A bias by distance, different for each head, if this variant has one."""
        if not self.biased:
            return {}
        distance = torch.arange(size) - torch.arange(size)[:, None]
        by_head = torch.arange(1, q.shape[1] + 1)[:, None, None] * torch.cos(distance * 1.3)
        return {"bias": 0.2 * by_head.to(q.dtype)}


def linear_part(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Exact in every dtype."""
    return q.flip(-1) * 0.5, k.roll(1, -1) * -2


def elita_logits(case: Case, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of key, query and token itself, exact in every dtype."""
    own = q[..., -1] * 2
    return (
        k[..., 0] * 2,
        q[..., 0],
        own if case.options["own"] else own.masked_fill(own > 0, -math.inf),
    )


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
                seen = (
                    torch.ones(len(keys), dtype=torch.bool)
                    if key_mask is None
                    else key_mask[b].clone()
                )
                if is_causal:
                    seen[i + 1 :] = False
                if case.op is cm.mixed_chunk_attention:
                    out[b, h, i] = _mixed(case, q[b, h], keys, values, h, i, seen, is_causal)
                elif case.op is cm.elita_attention:
                    out[b, h, i] = _elita(case, q[b, h, i], keys, values, i, seen)
                elif case.op is cm.gated_attention:
                    bias = case.bias(q, k.shape[2]).get("bias")
                    row = None if bias is None else bias[h, i, seen]
                    out[b, h, i] = _gated(case, q[b, h, i], keys[seen], values[seen], row)
                elif seen.any():
                    out[b, h, i] = _attend(case, q[b, h, i], keys[seen], values[seen])
    return out


def _elita(case: Case, q: Tensor, keys: Tensor, values: Tensor, i: int, seen: Tensor) -> Tensor:
    """The softmax of row i over the keys up to i, and over the token itself once more."""
    c, r, s = elita_logits(case, q[None], keys)
    logits, chosen = (c + r)[seen], values[seen]
    if seen[i]:
        logits, chosen = torch.cat((logits, s)), torch.cat((chosen, values[i : i + 1]))
    if len(logits) == 0:
        return torch.zeros_like(values[0])
    weights = (logits - logits.max()).exp()
    return weights @ chosen / weights.sum()


def _weight(case: Case, x: Tensor) -> Tensor:
    if case.options.get("activation", "relu2") == "relu2":
        return torch.where(x > 0, x * x, 0)
    y = (math.sqrt(0.5) - x) * math.sqrt(
        2 * math.pi
    )  # torch.special.ndtr is zero where this is still 1e-17
    return torch.tensor([math.erfc(z) / 2 for z in y.flatten().tolist()], dtype=torch.float64).view(
        x.shape
    )


def _gated(case: Case, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    scores = keys @ q / case.options.get("length_scale", max(len(keys), 1))
    return _weight(case, scores if bias is None else scores + bias) @ values


def _mixed(
    case: Case,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    h: int,
    i: int,
    seen: Tensor,
    is_causal: bool,
) -> Tensor:
    """Query i by the formula, token by token: masked ones do not count."""
    tokens = seen.nonzero()[:, 0].tolist()
    out = torch.zeros_like(values[0])
    if i not in tokens:
        return out
    g, bias, at = (
        case.options["group_size"],
        case.bias(q.expand(1, h + 1, *q.shape), 8).get("bias"),
        tokens.index(i),
    )
    lin_query, lin_key = linear_part(q, keys)
    for place, j in enumerate(tokens):
        if place // g == at // g:
            x = q[i] @ keys[j] / g + (0 if bias is None else bias[h, at % g, place % g])
            out = out + _weight(case, x) * values[j]
        if is_causal and place // g < at // g:
            out = out + (lin_query[i] @ lin_key[j]) * values[j] / g
        if not is_causal and (
            case.options.get("reduce_group_non_causal_attn", True) or place // g == at // g
        ):
            out = out + (lin_query[i] @ lin_key[j]) * values[j] / len(tokens)
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
    if (
        name == "softmax"
    ):  # a softmax over tokens in each feature, mixed by the query's softmax over features
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
    actual, exact = actual.detach(), exact.detach()
    infinite = actual.isinf() & (actual == exact)  # a sum over nothing, as a logarithm
    actual, exact = actual.masked_fill(infinite, 0), exact.masked_fill(infinite, 0)
    if not torch.isfinite(actual).all():
        return math.inf
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def assert_close(actual: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """Within the table's tolerance for `actual`'s dtype."""
    bound = TOLERANCE[actual.dtype] * factor
    if exact.numel() and not exact.any():
        assert not actual.any()
        return
    found = error(actual, exact)
    assert found <= bound, f"error {found:.2e} above {bound:.0e} for {actual.dtype}"


def tensors_of(state: cm.State | None) -> list[Tensor]:
    return [] if state is None else list(state.tensors().values())


def sums_of(state: cm.State | None) -> list[Tensor]:
    """All that a gradient can flow through."""
    return [x for x in tensors_of(state) if x.is_floating_point()]
