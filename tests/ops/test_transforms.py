"""torch.func's tangents, gradients and Jacobians of every operation, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from .cases import Case, by_fast_impl, error
from .functional import (
    as_function,
    by_case,
    by_few,
    by_form,
    compare,
    ignore_warnings,
    loss_of,
)

pytestmark = [ignore_warnings, pytest.mark.usefixtures("shorter_chunks")]


@by_fast_impl
@by_form
@by_case
def test_tangents(case: Case, form: str, impl: str):
    run, x, t = as_function(case, form, impl)
    exact, _, _ = as_function(case, form, "reference")
    compare(jvp(run, x, t)[1], jvp(exact, x, t)[1])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(x, t)]
        found = [forward_ad.unpack_dual(y).tangent for y in run(*duals)]
    compare(tuple(found), jvp(exact, x, t)[1])


@by_fast_impl
@by_few
def test_tangents_of_one_input(case: Case, impl: str):
    """None is lost, whichever input it comes with."""
    run, x, t = as_function(case, "stateful", impl)
    exact, _, _ = as_function(case, "stateful", "reference")
    for i in range(len(x)):
        one = [lambda y, f=f, i=i: f(*x[:i], y, *x[i + 1 :])[0] for f in (run, exact)]
        expected = jvp(one[1], (x[i],), (t[i],))[1]
        compare(jvp(one[0], (x[i],), (t[i],))[1], expected)
        with forward_ad.dual_level():
            out = one[0](forward_ad.make_dual(x[i], t[i]))
            compare(forward_ad.unpack_dual(out).tangent, expected)


@by_fast_impl
@by_few
@pytest.mark.parametrize("form", ["stateful", "masked", "bidirectional"])
def test_tangents_are_finite_differences(case: Case, form: str, impl: str):
    """Not only those of the reference."""
    run, x, _ = as_function(case, form, impl, T=3, sizes=(2, 2, 2))
    x = tuple(y.clone().requires_grad_() for y in x)
    assert torch.autograd.gradcheck(
        run, x, check_forward_ad=True, check_backward_ad=False, atol=1e-6, rtol=1e-4
    )


@by_fast_impl
@by_few
def test_tangents_in_single_precision(case: Case, impl: str):
    run, x, t = as_function(case, "causal", impl)
    exact = jvp(run, x, t)
    found = jvp(run, tuple(y.float() for y in x), tuple(y.float() for y in t))
    for a, b in zip(found, exact):
        for actual, expected in zip(a, b):
            assert error(actual, expected) < 1e-5


@by_fast_impl
@by_form
@by_case
def test_gradients(case: Case, form: str, impl: str):
    run, x, _ = as_function(case, form, impl)
    exact, _, _ = as_function(case, form, "reference")
    wrt = tuple(range(len(x)))
    compare(grad(loss_of(run), wrt)(*x), grad(loss_of(exact), wrt)(*x))


@by_fast_impl
@by_few
@pytest.mark.parametrize("form", ["masked", "packed", "stateful"])
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(case: Case, form: str, transform: Any, impl: str):
    run, x, _ = as_function(case, form, impl, T=9, sizes=(2, 2, 2))
    exact, _, _ = as_function(case, form, "reference", T=9, sizes=(2, 2, 2))
    wrt = tuple(range(len(x)))
    compare(transform(lambda *y: run(*y)[0], wrt)(*x), jacrev(lambda *y: exact(*y)[0], wrt)(*x))


NESTED: dict[str, Callable[..., Any]] = {
    "jvp of grad": lambda f, x, t: jvp(grad(f), (x,), (t,))[1],
    "grad of jvp": lambda f, x, t: grad(lambda y: jvp(f, (y,), (t,))[1])(x),
    "grad of grad": lambda f, x, t: grad(lambda y: (grad(f)(y) * t).sum())(x),
    "jvp of jvp": lambda f, x, t: jvp(lambda y: jvp(f, (y,), (t,))[1], (x,), (t,))[1],
    "vmap of jvp": lambda f, x, t: vmap(lambda s: jvp(f, (x,), (s,))[1])(torch.stack((t, x))),
    "jvp of vmap": lambda f, x, t: jvp(vmap(f), (torch.stack((x, t)),), (torch.stack((t, x)),))[1],
    "hessian": lambda f, x, t: hessian(f)(x),
    "jacfwd of jacrev": lambda f, x, t: jacfwd(jacrev(f))(x),
    "jacrev of jacrev": lambda f, x, t: jacrev(jacrev(f))(x),
    "vmap of grad of grad": lambda f, x, t: vmap(grad(lambda y: (grad(f)(y) * t).sum()))(
        torch.stack((x, t))
    ),
    "linearize": lambda f, x, t: linearize(f, x)[1](t),
    "vmap of vjp": lambda f, x, t: vmap(lambda c: vjp(f, x)[1](c)[0])(
        torch.tensor([1.0, 2.0], dtype=x.dtype)
    ),
    "vmap of vmap": lambda f, x, t: vmap(vmap(f))(torch.stack((x, t)).expand(3, 2, *x.shape)),
    "vmap of vmap of grad": lambda f, x, t: vmap(vmap(grad(f)))(
        torch.stack((x, t)).expand(2, 2, *x.shape)
    ),
}


@by_fast_impl
@by_few
@pytest.mark.parametrize("form", ["stateful", pytest.param("masked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("nested", NESTED)
def test_nested(case: Case, form: str, nested: str, impl: str):
    results = []
    for name in (impl, "reference"):
        run, x, t = as_function(case, form, name, T=5, sizes=(2, 2, 2))
        for i in (0, 1):
            f = loss_of(lambda y, i=i, run=run, x=x: run(*x[:i], y, *x[i + 1 :]))
            results.append(NESTED[nested](f, x[i], t[i]))
    compare(tuple(results[:2]), tuple(results[2:]), 10_000)


@by_fast_impl
@by_few
def test_gradients_of_gradients_across_the_edge_are_refused(case: Case, impl: str):
    """torch.func's gradient of a tensor that autograd follows too is never silently wrong."""
    run, x, _ = as_function(case, "causal", impl)
    leaf = x[0].clone().requires_grad_()
    first = grad(loss_of(lambda y: run(y, *x[1:])))(leaf)
    with pytest.raises(
        RuntimeError,
        match=r"no gradients of gradients across the edge of torch.func|no autograd formula",
    ):
        torch.autograd.grad(first.square().sum(), leaf)
