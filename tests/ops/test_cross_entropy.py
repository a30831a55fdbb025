"""The loss in pieces against logits formed whole: values, gradients, dtypes, mistakes, memory."""

import math

import pytest
import torch
from torch.nn import functional as F

from cumulant.kernels import product
from cumulant.ops import cross_entropy
from cumulant.ops.cross_entropy import fits, linear_cross_entropy

VOCAB, DIM = 90, 24
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", 16 * VOCAB)
    monkeypatch.setattr(cross_entropy, "FEWEST", 1)
    monkeypatch.setattr(cross_entropy, "BLOCK", 5 * VOCAB)
    monkeypatch.setattr(product, "ADDED", 7 * DIM)


@pytest.fixture(params=["torch's products", "oneDNN's"])
def products(request, monkeypatch):
    if request.param == "oneDNN's":
        if product._onednn is None:
            pytest.skip("this build of torch has no oneDNN")
        monkeypatch.setattr(product, "PREFERRED", True)
        monkeypatch.setattr(product, "LARGE", 0)
    else:
        monkeypatch.setattr(product, "PREFERRED", False)


def case(tokens=70, *, bias=False, dtype=torch.float64, seed=0):
    """Leaves (hidden, weight and perhaps bias) and labels, every fifth left out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, DIM), (VOCAB, DIM), *([(VOCAB,)] if bias else [])]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[3::5] = -100
    return [x.requires_grad_() for x in leaves], labels


def whole(leaves, labels, divisor=None):
    logits = F.linear(*leaves)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    return loss if divisor is None else loss * (labels != -100).sum() / divisor


def pieces(leaves, labels, divisor=None):
    hidden, weight, *bias = leaves
    return linear_cross_entropy(hidden, weight, labels, *bias, divisor=divisor)


def results(run, leaves, labels, **options):
    loss = run(leaves, labels, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("divisor", [None, 11, torch.tensor(7)])
def test_float64(tokens, bias, divisor):
    leaves, labels = case(tokens, bias=bias)
    labels[0] = 5
    for x, y in zip(
        results(pieces, leaves, labels, divisor=divisor),
        results(whole, leaves, labels, divisor=divisor),
    ):
        assert x.dtype == y.dtype == torch.float64
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def errors(run, leaves, labels, exact):
    return [
        float((x.double() - y).norm() / y.norm())
        for x, y in zip(results(run, leaves, labels), exact)
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_fp32(products, bias):
    leaves, labels = case(300, bias=bias, dtype=torch.float32)
    exact = results(whole, [x.detach().double().requires_grad_() for x in leaves], labels)
    found = results(pieces, leaves, labels)
    assert all(x.dtype == torch.float32 for x in found)
    assert max(errors(pieces, leaves, labels, exact)) < 1e-6


@pytest.mark.parametrize("how", ["autocast", "bf16 model"])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_is_as_exact_as_with_all_logits(how, bias):
    """Against float64: at most a tenth more than the usual way's error."""
    low = torch.float32 if how == "autocast" else torch.bfloat16
    leaves, labels = case(300, bias=bias, dtype=low)
    exact = results(whole, [x.detach().double().requires_grad_() for x in leaves], labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        ours, usual = (errors(run, leaves, labels, exact) for run in (pieces, whole))
        found = results(pieces, leaves, labels)
    assert [x.dtype for x in found] == [torch.float32, *[low] * len(leaves)]
    for ours_, usual_ in zip(ours, usual):
        assert ours_ < 1.1 * usual_ + 1e-6


def test_autocast_keeps_its_casts_for_others():
    """Autocast remembers casts of weights. One without a history would lose gradients later."""
    (hidden, weight), labels = case(dtype=torch.float32)
    with AUTOCAST, torch.no_grad():
        pieces((hidden, weight), labels)
    with AUTOCAST:
        pieces((hidden, weight), labels)
        assert torch.autograd.grad(F.linear(hidden, weight).sum(), weight)[0].any()


def test_only_wanted_gradients():
    """A frozen head has no gradient, and its product is not computed."""
    (hidden, weight, bias), labels = case(bias=True)
    expected = results(whole, [hidden, weight, bias], labels)
    frozen = linear_cross_entropy(hidden, weight.detach(), labels, bias.detach())
    kept = [x for x in frozen.grad_fn.saved_tensors if x is not None]
    assert [x.shape for x in kept] == [hidden.shape]
    assert torch.allclose(torch.autograd.grad(frozen, hidden)[0], expected[1])
    loss = linear_cross_entropy(hidden.detach(), weight, labels, bias.detach())
    assert torch.allclose(torch.autograd.grad(loss, weight)[0], expected[2])
    with torch.no_grad():
        assert torch.allclose(pieces((hidden, weight, bias), labels), expected[0])


def test_no_labels_and_no_tokens():
    """The mean over nothing is NaN, as torch's, and its gradients are zero."""
    leaves, labels = case(bias=True)
    labels[:] = -100
    loss, *gradients = results(pieces, leaves, labels)
    assert math.isnan(loss)
    assert math.isnan(whole(leaves, labels).item())
    assert not any(x.any() for x in gradients)
    loss, *gradients = results(pieces, leaves, labels, divisor=4)
    assert loss == 0
    assert not any(x.any() for x in gradients)
    assert math.isnan(pieces((leaves[0][:0], *leaves[1:]), labels[:0]).item())


def test_a_scaled_loss_twice_backward():
    """The gradients that the forward pass formed are scaled anew each time."""
    leaves, labels = case(bias=True)
    _, *expected = results(whole, leaves, labels)
    loss = pieces(leaves, labels) * 3
    for _ in range(2):
        for x, y in zip(torch.autograd.grad(loss, leaves, retain_graph=True), expected):
            assert torch.allclose(x, 3 * y)
    loss = pieces(leaves, labels)
    for _ in range(2):  # what autograd accumulates into must not be the gradients kept
        loss.backward(retain_graph=True)
    for x, y in zip(leaves, expected):
        assert torch.allclose(x.grad, 2 * y)


def test_gradients_of_gradients_are_an_error():
    """Else a penalty on gradients would silently leave out a part."""
    leaves, labels = case()
    with pytest.raises(RuntimeError, match="gradients of gradients are not implemented"):
        torch.autograd.grad(pieces(leaves, labels), leaves[0], create_graph=True)


def test_extreme_logits():
    """A label far below the largest logit has a finite loss, and the gradient is not NaN."""
    hidden = torch.full((2, 1), 400.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
    assert loss.item() == 400
    assert torch.isfinite(torch.autograd.grad(loss, weight)[0]).all()


@pytest.mark.parametrize("label", [VOCAB, -1])
def test_labels_beyond_the_vocabulary(label):
    leaves, labels = case()
    labels[4] = label
    with pytest.raises(
        ValueError, match=f"labels: expected ids from 0 to .* = {VOCAB - 1}.* got {label}"
    ):
        pieces(leaves, labels)
    with pytest.raises(ValueError, match=r"labels: expected \[N\] = \[70\]"):
        pieces(leaves, labels[1:])


def test_what_does_not_fit():
    """Transforms, traces, forward-mode derivatives and mixed dtypes are the caller's to avoid."""
    (hidden, weight), labels = case(dtype=torch.float32)
    assert fits(hidden, labels, weight, None)
    assert not fits(hidden, labels, weight.double(), None)
    assert not fits(hidden.to("meta"), labels, weight, None)
    seen = []
    torch.func.grad(lambda x: seen.append(fits(x, labels, weight, None)) or x.sum())(hidden)
    assert seen == [False]
    with AUTOCAST:
        assert fits(hidden, labels, weight.bfloat16(), None)


def test_the_logits_of_a_piece_alone_are_kept_in_memory():
    assert cross_entropy.piece_length(VOCAB) == 16
    hidden, labels = case()[0][0], case()[1]
    loss = linear_cross_entropy(hidden, case()[0][1], labels)
    assert sum(x.numel() for x in loss.grad_fn.saved_tensors if x is not None) == (70 + VOCAB) * DIM
