"""torch.func and forward-mode differentiation of the native kernels beside attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

from cumulant.ops import pointwise
from cumulant.ops.bilinear import bilinear
from cumulant.ops.project import project

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")


def angles(T: int, n: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(T)[:, None] / torch.arange(1, n + 1)
    return angle.cos(), angle.sin()


def turned(x: Tensor) -> Tensor:
    cosine, sine = (y.to(x.dtype) for y in angles(x.shape[2], x.shape[3] // 2))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, 0, weight.shape[0] - 1, 0))
    return sum(
        padded[:, weight.shape[0] - 1 - j :][:, : x.shape[1]] * w for j, w in enumerate(weight)
    )  # type: ignore[return-value]


# what runs, its formula, and the shapes of its inputs
ROWS: dict[
    str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]
] = {
    "swiglu": (
        pointwise.swiglu,
        lambda x, y: torch.nn.functional.silu(x) * y,
        ((2, 128, 64), (2, 128, 64)),
    ),
    "rms norm": (
        lambda x, w: pointwise.rms_norm(x, w, 1e-6),
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w,
        ((2, 128, 64), (64,)),
    ),
    "convolution": (pointwise.short_convolution, convolved, ((2, 128, 64), (4, 64))),
    "turn": (lambda x: pointwise.rotate_pairs(x, *angles(64, 8)), turned, ((2, 8, 64, 16),)),
    "project": (project, torch.nn.functional.linear, ((2, 200, 64), (128, 64), (128,))),
    "bilinear": (
        bilinear,
        lambda a, b, w: torch.einsum(
            "...a,...f,dfa->...d", a, b, w.unflatten(1, (b.shape[-1], a.shape[-1]))
        ),
        ((2, 9, 8), (2, 9, 3), (5, 24)),
    ),
}
by_row = pytest.mark.parametrize("name", ROWS)


def inputs(name: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in ROWS[name][2])


def double(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(y.double() for y in x)


def compare(actual: Any, exact: Any) -> None:
    actual, exact = (x if isinstance(x, tuple) else (x,) for x in (actual, exact))
    for a, b in zip(actual, exact, strict=True):
        assert b.any()
        assert float((a.double() - b).norm() / b.norm()) < 2e-6


@by_row
def test_tangents(name: str):
    run, formula, _ = ROWS[name]
    x, t = inputs(name, 0), inputs(name, 1)
    exact = jvp(formula, double(x), double(t))[1]
    compare(jvp(run, x, t)[1], exact)
    with forward_ad.dual_level():
        out = run(*(forward_ad.make_dual(a, b) for a, b in zip(x, t)))
        compare(forward_ad.unpack_dual(out).tangent, exact)


@by_row
def test_gradients_and_what_is_nested(name: str):
    run, formula, _ = ROWS[name]
    x, t = inputs(name, 0), inputs(name, 1)
    wrt = tuple(range(len(x)))

    def loss(f: Any) -> Any:
        return lambda *y: f(*y).sin().sum()

    compare(grad(loss(run), wrt)(*x), grad(loss(formula), wrt)(*double(x)))
    compare(
        jvp(lambda y: grad(loss(run))(y, *x[1:]), x[:1], t[:1])[1],
        jvp(lambda y: grad(loss(formula))(y, *double(x)[1:]), double(x)[:1], double(t)[:1])[1],
    )


@by_row
def test_mapped(name: str):
    """All inputs, each alone, and gradients for each sample."""
    run, formula, _ = ROWS[name]
    x = inputs(name, 0)
    stacks = tuple(torch.stack((y, y.flip(0))) for y in x)
    for i in range(-1, len(x)):
        dims = tuple(0 if i in (-1, j) else None for j in range(len(x)))
        given = [s if d == 0 else y for s, y, d in zip(stacks, x, dims)]
        compare(vmap(run, in_dims=dims)(*given), vmap(formula, in_dims=dims)(*double(tuple(given))))

    def sample(f: Any) -> Any:
        return grad(lambda row, *rest: f(row[None], *rest).sin().sum())

    rest = x[1:] if name not in ("swiglu", "bilinear") else (x[1][:1], *x[2:])
    dims = (0, *(None for _ in rest))
    found = vmap(sample(run), in_dims=dims)(x[0], *rest)
    compare(found, vmap(sample(formula), in_dims=dims)(x[0].double(), *double(rest)))


@by_row
def test_jacobians(name: str):
    """The backward pass is mapped over the gradients of a few outputs."""
    run, formula, _ = ROWS[name]
    x = inputs(name, 0)
    compare(jacrev(lambda y: run(y, *x[1:]).flatten()[:3])(x[0]),
            jacrev(lambda y: formula(y, *double(x)[1:]).flatten()[:3])(x[0].double()))  # fmt: skip


@by_row
def test_batched_gradients_of_autograd(name: str):
    run, _, _ = ROWS[name]
    x = tuple(y.requires_grad_() for y in inputs(name, 0))
    out = run(*x)
    upstream = torch.randn(2, *out.shape)
    found = torch.autograd.grad(out, x, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, x, u, retain_graph=True) for u in upstream]
    compare(found, tuple(torch.stack(y).double() for y in zip(*each)))
