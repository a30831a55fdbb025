"""torch.func's vmap of every operation: results and gradients of each sample, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import cumulant as cm

from .cases import CASES, Case, by_fast_impl
from .functional import (
    FEW,
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
def test_mapped(case: Case, form: str, impl: str):
    """All inputs or one are mapped, over any dimension; gradients are those of each sample."""
    run, x, t = as_function(case, form, impl)
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


@by_fast_impl
@by_few
def test_mapped_masks(case: Case, impl: str):
    q, k, v = case.inputs(2, T=11)
    masks = torch.rand(3, 2, 11) > 0.4

    def run(mask: Tensor, q: Tensor) -> Tensor:
        return case(q, k, v, is_causal=True, key_mask=mask, impl=impl)

    compare(vmap(run, in_dims=(0, None))(masks, q), torch.stack([run(mask, q) for mask in masks]))
    found = vmap(grad(lambda q, mask: run(mask, q).sin().sum()), in_dims=(None, 0))(q, masks)
    compare(found, torch.stack([grad(lambda q, m=m: run(m, q).sin().sum())(q) for m in masks]))


@by_fast_impl
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


@by_fast_impl
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


@by_fast_impl
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
    """Samples become rows of one call, which keeps no weights [T, S] and no features [T, F]."""
    from cumulant.kernels.native import attention as native

    calls = []
    run = native.call_library
    monkeypatch.setattr(native, "call_library", lambda name, a: (calls.append(name), run(name, a)))
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
    """Logits are checked where values can be read, which vmap does not allow."""
    case = next(c for c in CASES if c.name == "elita-own")
    _, _, v = case.inputs(T=5)
    bad = torch.full(v.shape[:3], float("nan"), dtype=v.dtype)
    good = torch.zeros_like(bad)
    with pytest.raises(ValueError, match="key_logit: expected logits below"):
        grad(lambda c: cm.elita_attention(c, good, good, v).sum())(bad)
    assert (
        vmap(lambda c: cm.elita_attention(c, good, good, v))(torch.stack((bad, bad))).isnan().any()
    )
