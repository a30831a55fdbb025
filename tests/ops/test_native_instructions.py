"""Native kernels on every instruction set: accuracy, rounding to half precision, and memory.

`make sanitize` runs all tests of native kernels on kernels compiled with sanitizers.
"""

from __future__ import annotations

import pytest
import torch

import cumulant as cm
from cumulant.kernels.native import library
from cumulant.kernels.operators.attention import call_attention
from cumulant.kernels.operators.elita import call_elita
from cumulant.kernels.spec import AttentionInputs, AttentionSpec, ElitaInputs, ElitaSpec

from .cases import TOLERANCE, error, inputs
from .native_calls import by_gates, gradients, linear, run_script, taylor

pytestmark = pytest.mark.usefixtures("small_grains")


@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("op", [linear, taylor, by_gates])
def test_every_instruction_set_equals_float64(name, dtype, op, monkeypatch):
    """Outputs, sums and gradients, at widths that fill vectors and at widths that do not."""
    if not library.loaded_library().cumulant_supports(library.INSTRUCTIONS.index(name)):
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(library, "instruction_set_name", lambda: name)
    for K, V, T in ((16, 64, 130), (7, 19, 70), (3, 130, 65)):
        x = [y.requires_grad_() for y in inputs(1, 4, T, K, V, dtype=dtype)]
        exact = [y.detach().double().requires_grad_() for y in x]
        for is_causal in (True, False):
            outs, expected = (
                op(*x, "native", is_causal=is_causal),
                op(*exact, "reference", is_causal=is_causal),
            )
            for actual, wanted in zip(outs, expected):
                assert error(actual, wanted) < 5 * TOLERANCE[dtype]
            for actual, wanted in zip(gradients(outs[:1], x), gradients(expected[:1], exact)):
                assert error(actual, wanted) < 20 * TOLERANCE[dtype]


def test_an_environment_variable_forces_an_instruction_set():
    script = "from cumulant.kernels.native import library; print(library.instruction_set_name())"
    assert run_script(script, CUMULANT_ISA="baseline").stdout.strip() == "baseline"
    failed = run_script(script, CUMULANT_ISA="avx1024")
    assert failed.returncode
    assert "CUMULANT_ISA: expected one of baseline" in failed.stderr
    assert "got 'avx1024'" in failed.stderr


@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_torchs(name, dtype, monkeypatch):
    """Every finite number of the format is kept, and ties between neighbours round alike."""
    if not library.loaded_library().cumulant_supports(library.INSTRUCTIONS.index(name)):
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(library, "instruction_set_name", lambda: name)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    value = every.view(1, 1, -1, 1)
    # each token attends to itself alone: out = v
    logits = (
        torch.zeros(1, 1, len(every)),
        torch.zeros(1, 1, len(every)),
        torch.zeros(1, 1, len(every)),
    )
    alone = torch.ones(len(every), dtype=torch.bool)
    out = call_elita(
        "native", ElitaInputs(*logits, value, alone), ElitaSpec(span=512, block=16)
    ).out
    finite = every.isfinite()
    assert torch.equal(out[0, 0, finite, 0], every[finite])
    # numbers between two of the format: the sum of both, halved by attending to both
    pairs = torch.stack((every[finite][:-1], every[finite][1:]), 1).reshape(1, 1, -1, 1)
    bounds = torch.arange(0, pairs.shape[2] + 1, 2)
    key = torch.ones_like(pairs)
    spec = AttentionSpec(0, True, "identity", 1.0, True, True, False, chunk=64, span=512)
    packed = call_attention(
        "native", AttentionInputs(key, key, pairs, cu_seqlens=bounds), spec
    ).out.to(dtype)
    middle = (pairs.float()[0, 0, ::2, 0] + pairs.float()[0, 0, 1::2, 0]) * 0.5
    assert torch.equal(packed[0, 0, 1::2, 0], middle.to(dtype))


def test_many_small_features_do_not_vanish_in_their_sum():
    """A quarter of a million of them, added one by one, would be wrong by 4e-4."""
    q, k, v = (x.abs() for x in inputs(1, 1, 100, 48, 16, G=1, dtype=torch.float32))
    out = cm.taylor_attention(q, k, v, 4, is_causal=True, impl="native")
    exact = cm.taylor_attention(
        *(x.double() for x in (q, k, v)), 4, is_causal=True, impl="reference"
    )
    assert error(out, exact) < 10 * TOLERANCE[torch.float32]


def test_one_block_forms_no_features_however_many_they_would_be():
    """K = 128 at order 4 would be 12 million features, with sums of 6 GB."""
    import resource

    x = [y.requires_grad_() for y in inputs(1, 2, 40, 128, 130, dtype=torch.float32)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = cm.taylor_attention(*x, 4, is_causal=True, impl="native")
    grads = gradients((out,), x)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200
    exact = [y.detach().double().requires_grad_() for y in x]
    for actual, wanted in zip(
        grads, gradients((cm.taylor_attention(*exact, 4, is_causal=True, impl="torch"),), exact)
    ):
        assert error(actual, wanted) < 20 * TOLERANCE[torch.float32]
    wide = inputs(1, 1, 4, 500, 2, G=1)
    assert cm.explain(cm.taylor_attention, *wide, 4).impl == "torch"
    with pytest.raises(
        ValueError, match=r"go up to 2\*\*31 features, and these are more: K = 500, order 4"
    ):
        cm.explain(cm.taylor_attention, *wide, 4, impl="native")
