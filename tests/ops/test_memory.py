"""Memory: what is kept for the backward pass, and peaks that grow linearly with the length."""

import subprocess
import sys

import pytest
import torch

import cumulant as cm

from .cases import CASES, CHUNK, by_fast_impl, linear_part

pytestmark = pytest.mark.usefixtures("short_chunks")


def kept(run, *inputs):
    """Bytes kept for the backward pass."""
    found = {}

    def note(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = run(*inputs)
    del out
    return sum(found.values())


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [10, 1000])
@by_fast_impl
def test_nothing_but_inputs_outputs_and_denominators_is_kept(is_causal, length, impl):
    """No features [T, F] and no weights [T, S] are kept.

    A long context also keeps its sums [F, V].
    """
    q, k, v = CASES[1].inputs(1, 2, length, 16, 16, G=2, dtype=torch.float32, requires_grad=True)
    sums = 0 if is_causal or (length <= CHUNK and impl == "torch") else 2 * 153 * 17 * 4
    used = kept(lambda *x: cm.taylor_attention(*x, is_causal=is_causal, impl=impl), q, k, v)
    output = v.numel()
    allowed = (q.numel() + k.numel() + v.numel() + output) * 4 + 2 * length * 4 + sums
    assert used <= allowed + 64


@pytest.mark.parametrize("is_causal", [True, False])
def test_gated_attention_keeps_only_its_inputs(is_causal):
    """No weights [T, g] or [T, S] are kept, and no sums [T / g, K, V]."""
    q, k, v = CASES[1].inputs(1, 2, 1000, 16, 16, G=2, dtype=torch.float32, requires_grad=True)
    lin_q, lin_k = (x.detach().requires_grad_() for x in linear_part(q, k))
    five = (q, k, lin_q, lin_k, v)
    used = kept(lambda *x: cm.mixed_chunk_attention(*x, group_size=32, is_causal=is_causal), *five)
    assert used <= sum(x.numel() for x in five) * 4 + 64
    used = kept(lambda *x: cm.gated_attention(*x, is_causal=is_causal), q, k, v)
    assert used <= sum(x.numel() for x in (q, k, v)) * 4 + 1000 * 4 + 64


MEMORY = """
import resource, torch, cumulant as cm
def run(T):
    x = [torch.randn(1, 4, T, d, requires_grad=True) for d in DIMS]
    CALL.sum().backward()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(LENGTH)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_mib(dims, call, length):
    """Most memory of forward and backward on `length` tokens, in a process of its own."""
    script = MEMORY.replace("DIMS", str(dims)).replace("CALL", call).replace("LENGTH", str(length))
    return float(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
    )


def test_memory_is_linear_in_the_length():
    """65,536 tokens, forward and backward, take far less than the features or weights would."""
    used = peak_mib([16, 16, 64], "cm.taylor_attention(*x, is_causal=True)", 65536)
    inputs_and_gradients = 2 * 4 * 65536 * (16 + 16 + 64) * 4 / 2**20
    outputs = 2 * 4 * 65536 * 65 * 4 / 2**20
    assert used < 1.5 * (
        inputs_and_gradients + outputs
    )  # the features of q and k would be 1.7 times as much again


@pytest.mark.parametrize(
    "options", ["is_causal=True", "is_causal=False", "reduce_group_non_causal_attn=False"]
)
def test_memory_of_mixed_chunks_is_linear_in_the_length(options):
    """The weights of all groups would be 256 MiB, the sums of all groups 128 MiB, kept or not."""
    dims = [32] * 4 + [64]
    used = peak_mib(dims, f"cm.mixed_chunk_attention(*x, group_size=256, {options})", 65536)
    tensors = 4 * 65536 * (2 * sum(dims) + 2 * 64) * 4 / 2**20
    assert used < 1.2 * tensors


def test_memory_of_gated_attention_is_linear_in_the_length():
    """Weights of all queries would be 1 GiB in each of four tensors; blocks take less."""
    used = peak_mib([16, 16, 16], "cm.gated_attention(*x, is_causal=True)", 8192)
    assert used < 256


@by_fast_impl
def test_elita_keeps_two_numbers_a_token(impl):
    """The native kernels also keep a mean in fp64 for every 16 tokens, those of Triton a state."""
    logits = [torch.randn(1, 2, 1000, requires_grad=True) for _ in range(3)]
    value = torch.randn(1, 2, 1000, 16, requires_grad=True)
    used = kept(lambda *x: cm.elita_attention(*x, impl=impl), *logits, value)
    means = {"native": 8 * 2 * (1000 // 16 + 2) * 16, "triton": 8 * 2 * (1000 // 16 + 2) * 17}
    assert (
        used
        <= sum(x.numel() for x in (*logits, value)) * 4 + 2 * 2 * 1000 * 4 + means.get(impl, 0) + 64
    )


def test_memory_of_elita_is_linear_in_the_length():
    """Values, outputs and their gradients are a 65,536th of the softmax weights."""
    call = "cm.elita_attention(*(y[..., 0] for y in x[:3]), x[3])"
    used = peak_mib([1, 1, 1, 64], call, 65536)
    assert used < 1.6 * 4 * 65536 * 4 * 64 * 4 / 2**20
