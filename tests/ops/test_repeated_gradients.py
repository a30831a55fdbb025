"""Backward passes of calls like an earlier one, which skip checks too."""

from __future__ import annotations

import pytest
import torch

from cumulant.kernels.native import attention

from .test_repeated import both, decays, heads, taylor


@pytest.fixture
def general(monkeypatch):
    """Counts backward passes that do not skip checks."""
    found, run = [], attention.backward

    def counted(*arguments):
        found.append(True)
        return run(*arguments)

    monkeypatch.setattr(attention, "backward", counted)
    return found


# what a gradient that reaches the output may lie like, [B, H, T, V]; whether it is read as it lies
UPSTREAM = {
    "heads apart": (lambda dout: dout, True),
    "heads side by side": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),
    "tokens apart": (lambda dout: torch.stack((dout, dout), 3)[:, :, :, 0], True),
    "one for all tokens": (lambda dout: dout[:, :, :1].expand_as(dout), True),
    "one for all heads": (lambda dout: dout[:1, :1].expand_as(dout), True),
    "numbers apart": (lambda dout: torch.stack((dout, dout), -1)[..., 0], False),
    "one a token": (lambda dout: dout[..., :1].expand_as(dout), False),
}


@both
@pytest.mark.parametrize("lies", UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_from_any_layout(op, lies, dtype, normalize, general):
    """Of the output, and of the state, whose gradient may lie in another way too."""
    if op is taylor and not normalize:
        pytest.skip("always normalised")
    options = {} if op is taylor else {"normalize": normalize}
    lay, direct = UPSTREAM[lies]
    for turned in (False, True):
        x = [y.requires_grad_() for y in heads(70, dtype=dtype)]
        _, past = op(*heads(3, dtype=dtype), is_causal=True, return_state=True, **options)
        sums = [y.requires_grad_() for y in past.tensors().values() if y.is_floating_point()]
        results = []
        dout = torch.randn(2, 4, 70, 16, dtype=torch.promote_types(dtype, torch.float32))
        for impl in ("native", "torch"):
            # in half precision the output is cast, and its gradient with it
            out, end = op(*x, is_causal=True, state=past, return_state=True, impl=impl, **options)
            dend = torch.ones_like(end.numerator)
            dend = dend.mT.contiguous().mT if turned else dend
            upstream = lay(dout.to(dtype)), dend
            results.append(torch.autograd.grad((out, end.numerator), (*x, *sums), upstream))
        if dtype != torch.bfloat16:  # whose gradients are copied as they are cast
            assert bool(general) == (turned or not direct)
        for ours, other in zip(*results, strict=True):
            close = {} if ours.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(ours, other, **close)
        general.clear()


@both
def test_a_negated_gradient(op):
    x = [y.requires_grad_() for y in heads()]
    dout = torch.randn(2, 4, 5, 16)
    negative = torch.complex(dout, -dout).conj().imag
    assert negative.is_neg()
    for ours, other in zip(
        torch.autograd.grad(op(*x, is_causal=True), x, negative),
        torch.autograd.grad(op(*x, is_causal=True), x, dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, other)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_saved_tensors_may_come_back_in_another_layout(op, dtype):
    """As from hooks that copy, compress or offload them, or from changes of `.data`."""
    from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

    def inputs():
        whole = torch.randn(2, 9, 12, 16, dtype=dtype)  # queries, keys and values of one product
        parts = (whole[:, :, :4, :4], whole[:, :, 4:6, :4], whole[:, :, 6:8])
        return [part.transpose(1, 2).detach().requires_grad_() for part in parts]

    def turned(t):
        return t.mT.contiguous().mT if t.dim() > 1 else t.clone()

    contexts = [
        saved_tensors_hooks(lambda t: t, torch.Tensor.contiguous),
        saved_tensors_hooks(lambda t: t, turned),
        saved_tensors_hooks(torch.Tensor.double, lambda t: t),
        save_on_cpu(),
    ]
    for context in contexts:
        x = inputs()
        dout = torch.randn(2, 4, 9, 16, dtype=dtype)
        expected = torch.autograd.grad(op(*x, is_causal=True), x, dout)
        with context:
            out = op(*x, is_causal=True)
        for ours, other in zip(torch.autograd.grad(out, x, dout), expected, strict=True):
            torch.testing.assert_close(ours.to(dtype), other)
    x = inputs()
    expected = torch.autograd.grad(op(*x, is_causal=True), x, dout)
    out = op(*x, is_causal=True)
    for y in x:
        y.data = y.data.contiguous()
    for ours, other in zip(torch.autograd.grad(out, x, dout), expected, strict=True):
        torch.testing.assert_close(ours, other)


@both
@pytest.mark.parametrize("which", range(4))
def test_shorter_saved_tensors_are_refused(op, which):
    """Their strides are those of the whole, and nothing is read behind their end."""
    x = [y.requires_grad_() for y in heads(9)]
    out = op(*x, is_causal=True)
    dout = torch.ones_like(out)
    changed = (*x, out)[which]
    changed.data = changed.data[:, :1]
    with pytest.raises((ValueError, RuntimeError), match="expected|shape"):
        torch.autograd.grad(out, x, dout)


@both
def test_the_backward_pass_ignores_the_default_device(op):
    for device in ("cpu", "meta"):
        x = [y.requires_grad_() for y in heads()]
        out = op(*x, is_causal=True, log_decay=decays().requires_grad_())
        with torch.device(device):
            out.backward(out.detach())
        assert all(y.grad.device.type == "cpu" for y in x)
