"""Operations without numbers, on meta and fake tensors, and transforms in compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import grad, jvp, vmap

from .cases import Case, sums_of
from .functional import FEW, as_function, by_few, compare, ignore_warnings, loss_of

pytestmark = [ignore_warnings, pytest.mark.usefixtures("shorter_chunks")]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@by_few
def test_on_the_meta_device(case: Case, impl: str):
    """Shapes alone, outputs and states."""
    q, k, v = case.inputs(2, T=11)
    out, end = case.run(q, k, v, True, impl=impl)
    found, state = (
        case.run(*(x.to("meta") for x in (q, k, v)), True, impl=impl)
        if not case.biased
        else (out, end)
    )
    assert (found.shape, found.dtype) == (out.shape, out.dtype)
    for a, b in zip(sums_of(state), sums_of(end)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@by_few
@pytest.mark.parametrize("impl", ["torch", "native"])
def test_under_fake_tensors(case: Case, impl: str):
    from torch._subclasses.fake_tensor import FakeTensorMode

    out = case(*case.inputs(2, T=11), is_causal=True, impl=impl)
    with FakeTensorMode():
        q, k, v = (torch.randn(x.shape, dtype=x.dtype) for x in case.inputs(2, T=11))
        assert case(q, k, v, is_causal=True, impl=impl).shape == out.shape


COMPILED = ("jvp", "grad", "vmap", "vmap of grad")


def compiled_rows() -> list[Any]:
    every = [
        (case, impl, form) for case in FEW for impl in case.implementations[1:] for form in COMPILED
    ]
    quick = [("mixed-bias", "native", form) for form in COMPILED] + [("taylor-2", "torch", "jvp")]
    marks = {True: (), False: (pytest.mark.slow,)}
    return [
        pytest.param(
            case,
            impl,
            form,
            marks=marks[(case.name, impl, form) in quick],
            id=f"{case.name}-{impl}-{form}",
        )
        for case, impl, form in every
    ]


@pytest.mark.parametrize(("case", "impl", "transform"), compiled_rows())
@pytest.mark.filterwarnings("ignore")
def test_compiled(case: Case, impl: str, transform: str):
    """A compiled graph gives the same values or an error, and never zeros."""
    torch._dynamo.reset()
    run, x, t = as_function(case, "causal", impl, T=3)
    loss = loss_of(run)
    forms = {
        "jvp": lambda a, b: jvp(lambda q: run(q, *x[1:])[0], (a,), (b,))[1],
        "grad": lambda a, b: grad(lambda q: loss(q, *x[1:]))(a),
        "vmap": lambda a, b: vmap(lambda q: run(q, *x[1:])[0])(torch.stack((a, b))),
        "vmap of grad": lambda a, b: vmap(grad(lambda q: loss(q, *x[1:])))(torch.stack((a, b))),
    }
    exact = forms[transform](x[0], t[0])
    compare(torch.compile(forms[transform], backend="aot_eager")(x[0], t[0]), exact)
