"""Native kernels on several threads: the same results, by the threads that torch already has."""

from __future__ import annotations

import sys

import pytest
import torch

from .cases import assert_close, inputs
from .native_calls import by_gates, gradients, linear, run_script, taylor
from .walking import walk

pytestmark = pytest.mark.usefixtures("small_grains")


@pytest.mark.usefixtures("kept_threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("op", [linear, taylor, by_gates])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sharing_out_a_sequence_changes_nothing(threads, heads, op, is_causal, monkeypatch):
    """Any number of threads may share columns and parts of sequences, with states."""
    walk(monkeypatch, span=32)
    walk(monkeypatch, elita_span=32)
    torch.set_num_threads(threads)
    H, G = heads
    q, k, v = (x.requires_grad_() for x in inputs(1, H, 333, 5, 70, G=G))
    results = []
    for impl in ("native", "torch"):
        outs = op(q, k, v, impl, is_causal=is_causal)
        results.append([*outs, *gradients(outs, (q, k, v))])
    for actual, wanted in zip(*results):
        assert_close(actual, wanted, 100)


@pytest.mark.usefixtures("kept_threads")
@pytest.mark.parametrize("bounds", [[0, 100, 100, 333], [0, 300]], ids=str)
@pytest.mark.parametrize("op", [linear, by_gates])
def test_sharing_out_packed_sequences_changes_nothing(bounds, op, monkeypatch):
    walk(monkeypatch, span=32)
    walk(monkeypatch, elita_span=32)
    torch.set_num_threads(5)
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 333, 5, 6, G=1))
    results = []
    for impl in ("native", "torch"):
        outs = op(q, k, v, impl, is_causal=True, cu_seqlens=torch.tensor(bounds))
        results.append([*outs, *gradients(outs, (q, k, v))])
    for actual, wanted in zip(*results):
        assert_close(actual, wanted, 100)


THREADS = """
import os, torch, cumulant as cm
torch.set_num_threads({count})
def threads(): return len(os.listdir("/proc/self/task"))
torch.randn(512, 512) @ torch.randn(512, 512)
torch.randn(1000000).exp()
before = threads()
q, k, v = (torch.randn(2, 4, 2048, d, requires_grad=True) for d in (16, 16, 64))
cm.taylor_attention(q, k, v, is_causal=True, impl="native").sum().backward()
maps = open("/proc/self/maps").read().split()
names = ("libgomp", "libomp", "libiomp")
runtimes = {{os.path.realpath(x) for x in maps if any(n in os.path.basename(x) for n in names)}}
print(threads() - before, len(runtimes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("count", [1, 2])
def test_threads_are_torchs(count):
    """None is added to those that torch already has, and there is one OpenMP runtime."""
    done = run_script(THREADS.format(count=count))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


def test_threads_of_our_own_where_torch_has_none_to_share():
    """Without the OpenMP runtime's entry point the kernels start threads themselves."""
    script = """
import torch, cumulant as cm
from cumulant.kernels.native import library
library._openmp_entry = lambda: None
torch.set_num_threads(3)
q, k, v = (torch.randn(1, 4, 500, d, dtype=torch.float64) for d in (4, 4, 8))
out = cm.taylor_attention(q, k, v, is_causal=True, impl="native")
exact = cm.taylor_attention(q, k, v, is_causal=True, impl="torch")
print((out - exact).abs().max().item() < 1e-12)
"""
    done = run_script(script)
    assert done.stdout.strip() == "True", done.stderr
