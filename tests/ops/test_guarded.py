"""Triton's kernels where "auto" takes them, here in the interpreter as if it were a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

import cumulant as cm
from cumulant.kernels import backends, guarded
from cumulant.kernels.triton import attention, device
from cumulant.ops.repeated import forget

from .cases import error
from .interpreter import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _auto_takes_triton(monkeypatch):
    monkeypatch.setattr(device, "slower", lambda x: "")
    monkeypatch.setattr(attention, "CHUNK", 16)
    monkeypatch.setattr(guarded, "TOKENS", 20)
    monkeypatch.setattr(backends, "_guarded", {})
    monkeypatch.setattr(guarded, "failures", failures := {})
    monkeypatch.setattr("cumulant.ops.dispatch.failures", failures)
    forget()
    yield
    forget()


def taylor(impl: str) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 25, 4, generator=draw).requires_grad_() for _ in range(3))
    out = cm.taylor_attention(q, k, v, is_causal=True, impl=impl)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def mixed(impl: str) -> list[torch.Tensor]:
    q = torch.ones(1, 1, 3, 4)
    return [cm.mixed_chunk_attention(q, q, q, q, q, group_size=16, is_causal=True, impl=impl)]


def half(impl: str) -> list[torch.Tensor]:
    """In fp16, where sums without a quotient are soon beyond its range."""
    q = torch.ones(1, 1, 3, 64).half()
    return [cm.linear_attention(q, q, q, normalize=False, is_causal=True, impl=impl)]


def linear(impl: str) -> list[torch.Tensor]:
    q = torch.ones(2, 1, 3, 4)
    return [cm.linear_attention(q, q, q, impl=impl)]


def elita_attention(impl: str) -> list[torch.Tensor]:
    x, v = torch.linspace(-1, 1, 25).expand(1, 1, 25), torch.randn(1, 1, 25, 4)
    return [cm.elita_attention(x, x, x, v, impl=impl)]


def explained() -> cm.Choice:
    q = torch.ones(1, 1, 3, 4)
    return cm.explain(cm.taylor_attention, q, q, q, is_causal=True)


@pytest.mark.parametrize("call", [taylor, linear, elita_attention, mixed, half])
def test_they_run(call):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = call("auto")
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(found, call("triton"), strict=True))
    assert explained().impl == "triton"


def test_a_kernel_that_does_not_compile_is_replaced(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of resource: shared memory, Required: 300000\nmore lines")

    monkeypatch.setattr(
        attention.Call, "launch", lambda self, *a, **k: device.launch(Kernel(), 1, self.q)
    )

    class Kernel:
        __name__ = "outputs"

        def __getitem__(self, grid):
            return fail

    cause = "outputs could not be compiled or started .RuntimeError: out of resource: shared memory"
    with pytest.warns(RuntimeWarning, match=cause) as seen:
        found = taylor("auto")
    assert len(seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, taylor("torch"), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taylor("auto")
        linear("auto")
    choice = explained()
    assert choice.impl != "triton"
    assert (
        "the fastest that works here (the Triton kernels do not: the kernel outputs"
        in choice.reason
    )
    with pytest.raises(guarded.KernelFailure, match=cause):
        taylor("triton")


def test_wrong_results_are_noticed(monkeypatch):
    right = attention.forward

    def wrong(inputs, spec):
        y = right(inputs, spec)
        y.out[..., -1, :] *= 1.5
        return y

    monkeypatch.setattr(attention, "forward", wrong)
    with pytest.warns(RuntimeWarning, match="their results differ from PyTorch's by"):
        found = taylor("auto")
    assert all(torch.equal(a, b) for a, b in zip(found, taylor("torch"), strict=True))


def test_a_backward_pass_that_fails_later_is_replaced(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 25, 4, generator=draw).requires_grad_() for _ in range(3))
    out = cm.taylor_attention(q, k, v, is_causal=True)

    def fail(*arguments):
        raise guarded.KernelFailure("the kernel key_gradients could not be started")

    monkeypatch.setattr(attention, "backward", fail)
    with pytest.warns(RuntimeWarning, match="key_gradients"):
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
    for actual, expected in zip(found, taylor("torch")[1:], strict=True):
        assert error(actual, expected) < 1e-5


def test_inputs_do_not_matter(recwarn):
    q = torch.full((1, 1, 5, 4), torch.nan)
    assert cm.taylor_attention(q, q, q, is_causal=True).isnan().all()
    assert not recwarn.list


def test_an_explicit_request_is_not_guarded(monkeypatch):
    monkeypatch.setattr(guarded.Guarded, "_run", None)
    taylor("triton")
    monkeypatch.setenv("CUMULANT_IMPL", "triton")
    taylor("auto")
