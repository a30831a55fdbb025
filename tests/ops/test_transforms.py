"""torch.func and forward-mode differentiation: every operation on every implementation, against the
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import cumulant as cm

from .cases import CASES, Case, assert_close, error, sums_of
from .walking import walk

# torch.func's first jvp compiles decompositions with torch.jit.script, which warns
# and its linearize about constants
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script.:DeprecationWarning",
    "ignore:Attempted to insert a get_attr Node:UserWarning",
)
NAMES = (
    "taylor-2", "taylor-3", "linear-elu", "linear-identity", "linear-softmax", "linear-pair",
    "gated-relu2",
    "gated-bias", "mixed-bias", "mixed-unreduced", "mixed-wide", "elita-own", "elita-partly-own",
)  # fmt: skip
SOME = [c for c in CASES if c.name in NAMES]
FEW = [
    c
    for c in CASES
    if c.name in ("taylor-2", "linear-softmax", "gated-bias", "mixed-bias", "elita-partly-own")
]
FORMS = ("causal", "bidirectional", "masked", "packed", "stateful", "one token")
by_case = pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
by_few = pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
by_impl = pytest.mark.parametrize("impl", ["torch", "native"])
by_form = pytest.mark.parametrize("form", FORMS)
Function = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    walk(monkeypatch, chunk=4, block=4)
    walk(monkeypatch, elita_chunk=2, elita_block=4)


def function(
    case: Case, form: str, impl: str, T: int = 11, sizes: tuple[int, ...] = (4, 3, 2)
) -> Any:
    """The operation as a function of all that gradients flow through, its inputs, and tangents for
    them.
    """
    if form == "bidirectional" and not case.bidirectional:
        pytest.skip("causal only")
    if form == "packed" and case.op is cm.gated_attention and case.biased:
        pytest.skip("a bias for each sequence's own length")
    H, K, V = sizes
    B, T = 1 if form == "packed" else 2, 1 if form == "one token" else T
    x = case.inputs(B, H, T, K, V, G=max(H // 2, 1))
    tangents = case.inputs(B, H, T, K, V, G=max(H // 2, 1), seed=1)
    options: dict[str, Any] = {"impl": impl}
    if form == "masked":
        options["key_mask"] = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) > 0.4
    if form == "packed":
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 9])
    start = None
    if form in ("stateful", "one token"):
        start = case.run(
            *case.inputs(B, H, 6, K, V, G=max(H // 2, 1), seed=2), True, impl="reference"
        )[1]
    parts = sums_of(start)

    def run(q: Tensor, k: Tensor, v: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        given = iter(sums)
        state = (
            None
            if start is None
            else start.map(lambda x: next(given) if x.is_floating_point() else x)
        )
        out, end = case.run(q, k, v, form != "bidirectional", state=state, **options)
        return (out, *(x.masked_fill(x == -torch.inf, 0) for x in sums_of(end)))

    generator = torch.Generator().manual_seed(3)
    more = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in parts]
    return run, (*x, *parts), (*tangents, *more)


def loss_of(run: Function) -> Callable[..., Tensor]:
    def loss(*x: Tensor) -> Tensor:
        outs = run(*x)
        return sum(
            (y.sin() * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outs
        )  # type: ignore[return-value]

    return loss


def compare(actual: Any, exact: Any, factor: float = 1000) -> None:
    """Equal, and not because all is zero."""
    actual, exact = (x if isinstance(x, tuple) else (x,) for x in (actual, exact))
    assert any(x.any() for x in exact)
    for a, b in zip(actual, exact, strict=True):
        if isinstance(a, tuple):
            compare(a, b, factor)
        else:
            assert_close(a, b, factor)


# ---- tangents ----


@by_impl
@by_form
@by_case
def test_tangents(case: Case, form: str, impl: str):
    run, x, t = function(case, form, impl)
    exact, _, _ = function(case, form, "reference")
    compare(jvp(run, x, t)[1], jvp(exact, x, t)[1])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(x, t)]
        found = [forward_ad.unpack_dual(y).tangent for y in run(*duals)]
    compare(tuple(found), jvp(exact, x, t)[1])


@by_impl
@by_few
def test_tangents_of_one_input(case: Case, impl: str):
    """None is lost, whichever input it comes with."""
    run, x, t = function(case, "stateful", impl)
    exact, _, _ = function(case, "stateful", "reference")
    for i in range(len(x)):
        one = [lambda y, f=f, i=i: f(*x[:i], y, *x[i + 1 :])[0] for f in (run, exact)]
        expected = jvp(one[1], (x[i],), (t[i],))[1]
        compare(jvp(one[0], (x[i],), (t[i],))[1], expected)
        with forward_ad.dual_level():
            out = one[0](forward_ad.make_dual(x[i], t[i]))
            compare(forward_ad.unpack_dual(out).tangent, expected)


@by_impl
@by_few
@pytest.mark.parametrize("form", ["stateful", "masked", "bidirectional"])
def test_tangents_are_finite_differences(case: Case, form: str, impl: str):
    """Not only those of the reference."""
    run, x, _ = function(case, form, impl, T=3, sizes=(2, 2, 2))
    x = tuple(y.clone().requires_grad_() for y in x)
    assert torch.autograd.gradcheck(
        run, x, check_forward_ad=True, check_backward_ad=False, atol=1e-6, rtol=1e-4
    )


@by_impl
@by_few
def test_tangents_in_single_precision(case: Case, impl: str):
    run, x, t = function(case, "causal", impl)
    exact = jvp(run, x, t)
    found = jvp(run, tuple(y.float() for y in x), tuple(y.float() for y in t))
    for a, b in zip(found, exact):
        for actual, expected in zip(a, b):
            assert error(actual, expected) < 1e-5


# ---- gradients, Jacobians, and what is nested ----


@by_impl
@by_form
@by_case
def test_gradients(case: Case, form: str, impl: str):
    run, x, _ = function(case, form, impl)
    exact, _, _ = function(case, form, "reference")
    wrt = tuple(range(len(x)))
    compare(grad(loss_of(run), wrt)(*x), grad(loss_of(exact), wrt)(*x))


@by_impl
@by_few
@pytest.mark.parametrize("form", ["masked", "packed", "stateful"])
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(case: Case, form: str, transform: Any, impl: str):
    run, x, _ = function(case, form, impl, T=9, sizes=(2, 2, 2))
    exact, _, _ = function(case, form, "reference", T=9, sizes=(2, 2, 2))
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


@by_impl
@by_few
@pytest.mark.parametrize("form", ["stateful", pytest.param("masked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("nested", NESTED)
def test_nested(case: Case, form: str, nested: str, impl: str):
    results = []
    for name in (impl, "reference"):
        run, x, t = function(case, form, name, T=5, sizes=(2, 2, 2))
        for i in (0, 1):
            f = loss_of(lambda y, i=i, run=run, x=x: run(*x[:i], y, *x[i + 1 :]))
            results.append(NESTED[nested](f, x[i], t[i]))
    compare(tuple(results[:2]), tuple(results[2:]), 10_000)


@by_impl
@by_few
def test_gradients_of_gradients_across_the_edge_are_refused(case: Case, impl: str):
    """A gradient taken by torch.func of what autograd follows as well: never silently wrong."""
    run, x, _ = function(case, "causal", impl)
    leaf = x[0].clone().requires_grad_()
    first = grad(loss_of(lambda y: run(y, *x[1:])))(leaf)
    with pytest.raises(
        RuntimeError,
        match=r"no gradients of gradients across the edge of torch.func|no autograd formula",
    ):
        torch.autograd.grad(first.square().sum(), leaf)


# ---- mapping ----


@by_impl
@by_form
@by_case
def test_mapped(case: Case, form: str, impl: str):
    """All inputs, each alone, and from any dimension; and per-sample gradients."""
    run, x, t = function(case, form, impl)
    stacks = [torch.stack((a, b, a * 0.5)) for a, b in zip(x, t)]
    if start := len(x) - 3:
        stacks[-start:] = [torch.stack((a, a * 0.5, a * 0.25)) for a in x[3:]]
    exact = [run(*(s[i] for s in stacks)) for i in range(3)]
    compare(vmap(run)(*stacks), tuple(torch.stack(y) for y in zip(*exact)))
    last = [s.movedim(0, -1) for s in stacks]
    compare(vmap(run, in_dims=-1, out_dims=1)(*last), tuple(torch.stack(y, 1) for y in zip(*exact)))
    for i in range(len(x)):
        dims = [0 if j == i else None for j in range(len(x))]
        found = vmap(run, in_dims=tuple(dims))(
            *(s if j == i else x[j] for j, s in enumerate(stacks))
        )
        each = [run(*x[:i], row, *x[i + 1 :]) for row in stacks[i]]
        compare(found, tuple(torch.stack(y) for y in zip(*each)))
    wrt = tuple(range(len(x)))
    each = [grad(loss_of(run), wrt)(*(s[i] for s in stacks)) for i in range(3)]
    compare(vmap(grad(loss_of(run), wrt))(*stacks), tuple(torch.stack(y) for y in zip(*each)))
    total = grad(lambda *y: vmap(loss_of(run))(*y).sum(), wrt)(*stacks)
    compare(total, tuple(torch.stack(y) for y in zip(*each)))


@by_impl
@by_few
def test_mapped_masks(case: Case, impl: str):
    q, k, v = case.inputs(2, T=11)
    masks = torch.rand(3, 2, 11) > 0.4

    def run(mask: Tensor, q: Tensor) -> Tensor:
        return case(q, k, v, is_causal=True, key_mask=mask, impl=impl)

    compare(vmap(run, in_dims=(0, None))(masks, q), torch.stack([run(mask, q) for mask in masks]))
    found = vmap(grad(lambda q, mask: run(mask, q).sin().sum()), in_dims=(None, 0))(q, masks)
    compare(found, torch.stack([grad(lambda q, m=m: run(m, q).sin().sum())(q) for m in masks]))


@by_impl
@pytest.mark.parametrize("case", [c for c in FEW if not c.biased], ids=lambda c: c.name)
def test_mapped_packings(case: Case, impl: str):
    """Offsets that differ from call to call."""
    q, k, v = case.inputs(1, T=11)
    bounds = torch.tensor([[0, 4, 11], [0, 7, 9], [0, 0, 11]])

    def run(cu: Tensor, q: Tensor) -> Tensor:
        return case(q, k, v, is_causal=True, cu_seqlens=cu, impl=impl)

    if (
        case.name == "linear-softmax"
    ):  # whose sums over each sequence are taken in PyTorch, by the offsets' values
        pytest.skip("values")
    compare(vmap(run, in_dims=(0, None))(bounds, q), torch.stack([run(cu, q) for cu in bounds]))
    found = vmap(grad(lambda q, cu: run(cu, q).sin().sum()), in_dims=(None, 0))(q, bounds)
    compare(found, torch.stack([grad(lambda q, c=c: run(c, q).sin().sum())(q) for c in bounds]))


@by_impl
@pytest.mark.parametrize("op", ["gated", "mixed"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_mapped_biases(op: str, heads: int, packed: bool, impl: str):
    """Shared, mapped, and their gradients for each sample."""
    q, k, v = CASES[1].inputs(1 if packed else 2, T=8)
    size = 8 if op == "gated" else 4
    biases, rows = (
        torch.randn(3, heads, size, size, dtype=q.dtype),
        torch.stack((q, q * 2, q.flip(0) * 0.5)),
    )
    options = {"is_causal": True, "cu_seqlens": torch.tensor([0, 3, 7]) if packed else None}
    if op == "gated":
        impl = "torch"

    def run(bias: Tensor, q: Tensor) -> Tensor:
        if op == "gated":
            return cm.gated_attention(
                q, k, v, bias=bias[0] if heads == 1 else bias, impl=impl, **options
            )
        return cm.mixed_chunk_attention(
            q, k, q, k, v, group_size=4, bias=bias[0] if heads == 1 else bias, impl=impl, **options
        )

    def loss(bias: Tensor, q: Tensor) -> Tensor:
        return run(bias, q).sin().sum()

    for dims in ((0, None), (None, 0), (0, 0)):
        given = (biases if dims[0] == 0 else biases[0], rows if dims[1] == 0 else q)
        each = [tuple(x[i] if d == 0 else x for x, d in zip(given, dims)) for i in range(3)]
        compare(vmap(run, in_dims=dims)(*given), torch.stack([run(*x) for x in each]))
        found = vmap(grad(loss, (0, 1)), in_dims=dims)(*given)
        expected = [grad(loss, (0, 1))(*x) for x in each]
        compare(found, tuple(torch.stack(x) for x in zip(*expected)))


@by_impl
@by_few
def test_batched_gradients_of_autograd(case: Case, impl: str):
    """The backward pass itself, mapped over upstream gradients."""
    q, k, v = case.inputs(2, T=11, requires_grad=True)
    out = case(q, k, v, is_causal=True, impl=impl)
    upstream = torch.randn(3, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, (q, k, v), upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, (q, k, v), u, retain_graph=True) for u in upstream]
    compare(found, tuple(torch.stack(x) for x in zip(*each)))


@pytest.mark.parametrize("op", ["gated", "mixed"])
def test_dropout_follows_the_randomness_that_is_asked_for(op: str):
    q, k, v = CASES[1].inputs(2, T=8, dtype=torch.float32)
    rows = torch.stack((q, q, q))

    def run(q: Tensor) -> Tensor:
        if op == "gated":
            return cm.gated_attention(q, k, v, dropout_p=0.5)
        return cm.mixed_chunk_attention(q, k, q, k, v, group_size=4, dropout_p=0.5)

    same = vmap(run, randomness="same")(rows)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    different = vmap(run, randomness="different")(rows)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(rows)


def test_mapping_runs_the_kernel_once(monkeypatch):
    """A reshape into the batch, not a loop; and per-sample gradients keep no weights [T, S] and no
    features [T, F].
    """
    from cumulant.kernels.native import attention as native

    calls = []
    monkeypatch.setattr(
        native, "call", lambda name, a, inner=native.call: (calls.append(name), inner(name, a))
    )
    q, k, v = CASES[1].inputs(7, 2, 40, 4, 3, dtype=torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (
            cm.taylor_attention(q[None], k[None], v[None], is_causal=True, impl="native")
            .sin()
            .sum()
        )

    vmap(grad(loss, (0, 1, 2)))(q, k, v)
    assert calls == ["cumulant_attention_forward", "cumulant_attention_backward"]


def test_logits_are_still_checked():
    """Where values can be read; not under vmap, which has none to read."""
    case = next(c for c in CASES if c.name == "elita-own")
    _, _, v = case.inputs(T=5)
    bad = torch.full(v.shape[:3], float("nan"), dtype=v.dtype)
    good = torch.zeros_like(bad)
    with pytest.raises(ValueError, match="key_logit: expected logits below"):
        grad(lambda c: cm.elita_attention(c, good, good, v).sum())(bad)
    assert (
        vmap(lambda c: cm.elita_attention(c, good, good, v))(torch.stack((bad, bad))).isnan().any()
    )


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
    """Inside a graph: the same values, or an error, never zeros."""
    torch._dynamo.reset()
    run, x, t = function(case, "causal", impl, T=3)
    loss = loss_of(run)
    forms = {
        "jvp": lambda a, b: jvp(lambda q: run(q, *x[1:])[0], (a,), (b,))[1],
        "grad": lambda a, b: grad(lambda q: loss(q, *x[1:]))(a),
        "vmap": lambda a, b: vmap(lambda q: run(q, *x[1:])[0])(torch.stack((a, b))),
        "vmap of grad": lambda a, b: vmap(grad(lambda q: loss(q, *x[1:])))(torch.stack((a, b))),
    }
    exact = forms[transform](x[0], t[0])
    compare(torch.compile(forms[transform], backend="aot_eager")(x[0], t[0]), exact)
