"""Calls of the native kernels that several test files make."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import cumulant as cm
from cumulant.kernels.native import library

from ..quick import slow_but


def gradients(outs, leaves):
    """Gradients of a loss that every output enters, by the means of its rows."""
    weights = (
        torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).to(x.dtype).view_as(x)
        for x in outs
    )
    loss = sum((x * weight).mean(-1).sum() for x, weight in zip(outs, weights))
    return torch.autograd.grad(loss, leaves)


def linear(q, k, v, impl, **options):
    out, state = cm.linear_attention(q, k, v, return_state=True, impl=impl, **options)
    return out, state.numerator, state.denominator


def taylor(q, k, v, impl, **options):
    out, state = cm.taylor_attention(q, k, v, return_state=True, impl=impl, **options)
    return out, state.numerator, state.denominator


def by_gates(q, k, v, impl, is_causal, **options):
    logits = 3 * k[..., 0], q[..., 0], q[..., 1]
    out, state = cm.elita_attention(*logits, v, return_state=True, impl=impl, **options)
    return out, state.log_weight, state.mean


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a Python process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


# the tests of a file under each instruction set, for `run_tests_on`
by_instruction_set = pytest.mark.parametrize("isa", slow_but(("avx2",), library.INSTRUCTIONS))


def run_tests_on(isa: str, file: str, *names: str) -> None:
    """Runs tests of a file in a process whose kernels use one instruction set, or skips."""
    if not library.loaded_library().cumulant_supports(library.INSTRUCTIONS.index(isa)):
        pytest.skip(f"this machine has no {isa}")
    if isa == library.instruction_set_name():
        pytest.skip("they run in this process")
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *(f"{file}::{name}" for name in names)]
    environment = {**os.environ, "CUMULANT_ISA": isa}
    subprocess.run(command, env=environment, check=True, capture_output=True)
