"""A new implementation is a folder and a line in the table, as one made here shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import cumulant as cm
from cumulant.kernels import backends

from .cases import inputs

ATTENTION = """
from cumulant.kernels.torch.attention import backward, forward as run, obstacle, prepared

calls = []

def describe(inputs, spec):
    return "toys"

def forward(inputs, spec):
    calls.append(spec)
    return run(inputs, spec)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "toy_kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "attention.py").write_text(ATTENTION)
    monkeypatch.syspath_prepend(tmp_path)
    import toy_kernels

    monkeypatch.setitem(backends.BACKENDS, "toy", toy_kernels)
    monkeypatch.setattr(backends, "_sought", set())
    yield toy_kernels
    for name in ("toy_kernels", "toy_kernels.attention"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("op", [cm.taylor_attention, cm.linear_attention])
def test_operations_run_it(toy, op):
    q, k, v = (x.requires_grad_() for x in inputs())
    found, wanted = (op(q, k, v, is_causal=True, impl=impl) for impl in ("toy", "torch"))
    assert torch.equal(found, wanted)
    assert len(toy.attention.calls) == 1
    upstream = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (found, wanted))):
        assert torch.equal(a, b)
    assert cm.explain(op, q, k, v, impl="toy").reason.startswith("asked for: toys; ")


def test_the_variable_names_it(toy, monkeypatch):
    monkeypatch.setenv("CUMULANT_IMPL", "toy")
    assert cm.explain(cm.taylor_attention, *inputs()).reason.startswith(
        "asked for by CUMULANT_IMPL: toys; "
    )


def test_operations_that_it_does_not_have_say_so(toy):
    with pytest.raises(
        ValueError, match="'toy' cannot run this call: this operation has no toy kernels"
    ):
        cm.gated_attention(*inputs(), impl="toy")
    with pytest.raises(
        ValueError, match="expected 'auto', 'reference', 'toy', 'torch', 'native' or 'triton'"
    ):
        cm.gated_attention(*inputs(), impl="toys")


def test_without_it_the_name_is_unknown():
    with pytest.raises(
        ValueError, match="expected 'auto', 'reference', 'torch', 'native' or 'triton', got 'toy'"
    ):
        cm.taylor_attention(*inputs(), impl="toy")


def test_explain_reads_packed_sequences_as_the_call_does():
    """Three short sequences are one block each, however long they are together."""
    q, k, v = inputs(1, T=300)
    short, long = torch.tensor([0, 40, 100, 110]), torch.tensor([0, 200, 300])
    for impl, length in (("native", 60), ("torch", 60)):
        options = {"is_causal": True, "impl": impl}
        reason = cm.explain(cm.taylor_attention, q, k, v, cu_seqlens=short, **options).reason
        assert f"one block of {length} tokens, the quadratic form" in reason
        assert (
            "chunks of"
            in cm.explain(cm.taylor_attention, q, k, v, cu_seqlens=long, **options).reason
        )
