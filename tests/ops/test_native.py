"""What is the native kernels' own: instruction sets, threads, the boundary to C++, installation
without a compiler.

`make sanitize` runs this file, and the matrix, on kernels compiled with the address and
undefined-behaviour sanitizers.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cumulant as cm
from cumulant.kernels.native import library
from cumulant.kernels.operators.attention import attention
from cumulant.kernels.operators.elita import elita
from cumulant.kernels.spec import AttentionInputs, AttentionSpec, ElitaInputs, ElitaSpec
from cumulant.ops.state import MixedChunkState

from .cases import TOLERANCE, assert_close, error, inputs
from .walking import walk

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _threads():
    """Any number of threads, for any work."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _small_grains(monkeypatch):
    monkeypatch.setattr(library, "GRAIN", 1)


def gradients(outs, leaves):
    """Of a loss that every output enters, by the means of its rows."""
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


# ---- instruction sets ----


@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("op", [linear, taylor, by_gates])
def test_every_instruction_set_equals_float64(name, dtype, op, monkeypatch):
    """Outputs, sums and gradients, at widths that fill vectors and at widths that do not."""
    if not library.loaded().cumulant_supports(library.INSTRUCTIONS.index(name)):
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(library, "instructions", lambda: name)
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


@pytest.fixture
def _unwritten_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def groups_of_a_hundred(rows: int, tokens: int, dtype: torch.dtype, monkeypatch, name: str):
    """Arguments of `mixed_chunk_attention` for groups longer than a block of the kernels, on an
    instruction set.
    """
    if not library.loaded().cumulant_supports(library.INSTRUCTIONS.index(name)):
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(library, "instructions", lambda: name)
    torch.set_num_threads(4)  # twice the heads of one row: its columns are shared out, too
    torch.manual_seed(0)
    H, G, K, L, V, size = 4, 2, 17, 19, 150, 100
    shapes = (H, K), (G, K), (H, L), (G, L), (G, V)
    tensors = [torch.rand(rows, heads, tokens, width).to(dtype) for heads, width in shapes]
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[1:] = torch.rand(rows - 1, tokens) > 0.3
    bias = torch.rand(H if rows == 1 else 1, size, size).to(dtype)
    options = {
        "group_size": size,
        "is_causal": True,
        "activation": "laplace" if rows == 1 else "relu2",
    }
    return tensors, mask, bias, options


@pytest.mark.usefixtures("_threads", "_unwritten_is_nan")
@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2], ids=["even", "masked"])
def test_steps_through_groups_longer_than_a_block(name, dtype, rows, monkeypatch):
    """Single tokens onto open groups of every fill; of two rows one does not have every token, so
    that fills differ.
    """
    tensors, mask, bias, options = groups_of_a_hundred(rows, 209, dtype, monkeypatch, name)
    exact = [x.double() for x in tensors]
    state = cm.mixed_chunk_attention(*(x[:, :, :0] for x in tensors), **options, return_state=True)[
        1
    ]
    for t in range(mask.shape[1]):
        token = [x[:, :, t : t + 1] for x in tensors]
        seen = {"bias": bias, "state": state} | (
            {} if rows == 1 else {"key_mask": mask[:, t : t + 1]}
        )
        out, state = cm.mixed_chunk_attention(
            *token, **options, **seen, return_state=True, impl="native"
        )
        if t % 9 == 0 or t % 100 > 97:
            so_far, seen = (
                [x[:, :, : t + 1] for x in exact],
                {
                    "bias": bias.double(),
                    "key_mask": mask[:, : t + 1],
                },
            )
            whole, past = cm.mixed_chunk_attention(
                *so_far, **options, **seen, return_state=True, impl="reference"
            )
            assert error(out, whole[:, :, -1:]) < 5 * TOLERANCE[dtype]
            for part, expected in past.tensors().items():
                assert error(getattr(state, part), expected) < 5 * TOLERANCE[dtype]


@pytest.mark.usefixtures("_threads", "_unwritten_is_nan")
@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2], ids=["even", "masked"])
@pytest.mark.parametrize("tokens", [1, 3, 120])
def test_onto_groups_more_than_a_block_full(name, dtype, rows, tokens, monkeypatch):
    """Outputs, the state, and gradients of tokens, bias and state, where whole blocks of a group
    ask nothing.
    """
    tensors, mask, bias, options = groups_of_a_hundred(rows, 97 + tokens, dtype, monkeypatch, name)
    early, late = ([x[:, :, part] for x in tensors] for part in (slice(97), slice(97, None)))
    state = cm.mixed_chunk_attention(
        *early, **options, bias=bias, key_mask=mask[:, :97], return_state=True
    )[1]
    results = []
    for impl, wide in (("native", False), ("reference", True)):
        parts = [*late, bias, *(x for x in state.tensors().values() if x.is_floating_point())]
        leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in parts]
        past = MixedChunkState(*leaves[6:], state.position)
        seen = {"bias": leaves[5], "key_mask": mask[:, 97:], "state": past}
        out, after = cm.mixed_chunk_attention(
            *leaves[:5], **options, **seen, return_state=True, impl=impl
        )
        found = [out, *(x for x in after.tensors().values() if x.is_floating_point())]
        results.append((found, gradients(found, leaves)))
    for actual, wanted in zip(*(outs for outs, _ in results)):
        assert error(actual, wanted) < 5 * TOLERANCE[dtype]
    for actual, wanted in zip(*(grads for _, grads in results)):
        assert error(actual, wanted) < 20 * TOLERANCE[dtype]


@pytest.mark.usefixtures("_unwritten_is_nan")
@pytest.mark.parametrize(("H", "V"), [(2, 0), (0, 5)], ids=["no values", "no heads"])
def test_states_of_nothing_to_attend(H, V):
    tokens = [torch.rand(1, h, 3, d) for h, d in ((H, 3), (1, 3), (H, 2), (1, 2), (1, V))]
    found = {}
    for impl in ("auto", "reference"):
        options = {"group_size": 8, "is_causal": True, "return_state": True, "impl": impl}
        _, state = cm.mixed_chunk_attention(*tokens, **options)
        found[impl] = cm.mixed_chunk_attention(
            *(x[:, :, :1] for x in tokens), state=state, **options
        )[1].tensors()
    assert all(
        torch.equal(found["auto"][name], wanted) for name, wanted in found["reference"].items()
    )


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_an_environment_variable_forces_an_instruction_set():
    script = "from cumulant.kernels.native.library import instructions; print(instructions())"
    assert run(script, CUMULANT_ISA="baseline").stdout.strip() == "baseline"
    failed = run(script, CUMULANT_ISA="avx1024")
    assert failed.returncode
    assert "CUMULANT_ISA: expected one of baseline" in failed.stderr
    assert "got 'avx1024'" in failed.stderr


@pytest.mark.parametrize("name", library.INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_torchs(name, dtype, monkeypatch):
    """Every finite number of the format, the ties between neighbours, what overflows, infinity,
    NaN.
    """
    if not library.loaded().cumulant_supports(library.INSTRUCTIONS.index(name)):
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setattr(library, "instructions", lambda: name)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    value = every.view(1, 1, -1, 1)
    # each token attends to itself alone: out = v
    logits = (
        torch.zeros(1, 1, len(every)),
        torch.zeros(1, 1, len(every)),
        torch.zeros(1, 1, len(every)),
    )
    alone = torch.ones(len(every), dtype=torch.bool)
    out = elita("native", ElitaInputs(*logits, value, alone), ElitaSpec(span=512, block=16)).out
    finite = every.isfinite()
    assert torch.equal(out[0, 0, finite, 0], every[finite])
    # numbers between two of the format: the sum of both, halved by attending to both
    pairs = torch.stack((every[finite][:-1], every[finite][1:]), 1).reshape(1, 1, -1, 1)
    bounds = torch.arange(0, pairs.shape[2] + 1, 2)
    key = torch.ones_like(pairs)
    spec = AttentionSpec(0, True, "identity", 1.0, True, True, False, chunk=64, span=512)
    packed = attention("native", AttentionInputs(key, key, pairs, cu_seqlens=bounds), spec).out.to(
        dtype
    )
    middle = (pairs.float()[0, 0, ::2, 0] + pairs.float()[0, 0, 1::2, 0]) * 0.5
    assert torch.equal(packed[0, 0, 1::2, 0], middle.to(dtype))


def test_many_small_features_do_not_vanish_in_their_sum():
    """A quarter of a million of them, each some units of the sum's last digit: added one by one
    they come to 4e-4.
    """
    q, k, v = (x.abs() for x in inputs(1, 1, 100, 48, 16, G=1, dtype=torch.float32))
    out = cm.taylor_attention(q, k, v, 4, is_causal=True, impl="native")
    exact = cm.taylor_attention(
        *(x.double() for x in (q, k, v)), 4, is_causal=True, impl="reference"
    )
    assert error(out, exact) < 10 * TOLERANCE[torch.float32]


def test_one_block_forms_no_features_however_many_they_would_be():
    """K = 128 at order 4: 12 million features, 6 GB of sums."""
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


# ---- threads ----


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("op", [linear, taylor, by_gates])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sharing_out_a_sequence_changes_nothing(threads, heads, op, is_causal, monkeypatch):
    """However many threads share the columns and the parts of sequences, states going in and
    out.
    """
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


@pytest.mark.usefixtures("_threads")
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
    done = run(THREADS.format(count=count))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


def test_threads_of_our_own_where_torch_has_none_to_share():
    """Without the OpenMP runtime's entry point the kernels start threads themselves."""
    script = """
import torch, cumulant as cm
from cumulant.kernels.native import library
library._openmp = lambda: None
torch.set_num_threads(3)
q, k, v = (torch.randn(1, 4, 500, d, dtype=torch.float64) for d in (4, 4, 8))
out = cm.taylor_attention(q, k, v, is_causal=True, impl="native")
exact = cm.taylor_attention(q, k, v, is_causal=True, impl="torch")
print((out - exact).abs().max().item() < 1e-12)
"""
    done = run(script)
    assert done.stdout.strip() == "True", done.stderr


# ---- the boundary ----


def arguments(**changes):
    q, k, v = inputs(2, 4, 10, 3, 5, dtype=torch.float32)
    given = {
        "query": q,
        "key": k,
        "value": v,
        "key_mask": None,
        "cu_seqlens": None,
        "numerator": None,
    }
    given |= {
        "denominator": None,
        "returns_state": True,
        "order": 2,
        "constant_term": True,
        "activation": "identity",
    }
    given |= {
        "scale": 1.0,
        "normalize": True,
        "is_causal": True,
        "chunk": 64,
        "span": 512,
    } | changes
    spec = AttentionSpec(**{field.name: given.pop(field.name) for field in fields(AttentionSpec)})
    return "native", AttentionInputs(**given), spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(2, 2, 10, 4)}, r"key: expected \[2, 2, 10, 3\], got \[2, 2, 10, 4\]"),
        (
            {"value": torch.zeros(2, 2, 9, 5)},
            r"value: expected \[2, 2, 10, 5\], got \[2, 2, 9, 5\]",
        ),
        (
            {"value": torch.zeros(2, 2, 10, 5).long()},
            r"value: expected fp16, bf16, fp32 or fp64, got torch.int64",
        ),
        (
            {"key": torch.zeros(2, 3, 10, 3), "value": torch.zeros(2, 3, 10, 5)},
            "key: expected heads that divide",
        ),
        (
            {"key": torch.zeros(2, 2, 7, 3), "value": torch.zeros(2, 2, 7, 5)},
            "key: expected 10 tokens, as many",
        ),
        (
            {"key_mask": torch.ones(2, 9, dtype=torch.bool)},
            r"key_mask: expected \[2, 10\], got \[2, 9\]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 10])},
            "cu_seqlens: expected offsets that rise from 0 .* and B = 1",
        ),
        ({"order": 9}, "order: expected at most 8, got 9"),
        ({"order": -1}, "order: expected at most 8, got -1"),
        ({"activation": "gelu"}, "activation: expected one of"),
        ({"chunk": 65}, "chunk: expected 1 to 64, got 65"),
        ({"chunk": 0}, "chunk: expected 1 to 64, got 0"),
        ({"span": 0}, "span: expected at least 1, got 0"),
        (
            {"numerator": torch.zeros(2, 2, 9, 5)},
            r"numerator: expected \[2, 2, 10, 5\], got \[2, 2, 9, 5\]",
        ),
        (
            {"numerator": torch.zeros(2, 2, 10, 5)},
            "denominator: expected with the numerator, got None",
        ),
        (
            {"denominator": torch.zeros(2, 2, 9)},
            r"denominator: expected \[2, 2, 10\], got \[2, 2, 9\]",
        ),
    ],
)
def test_what_does_not_fit_never_reaches_the_kernels(changes, message):
    with pytest.raises(ValueError, match=message):
        attention(*arguments(**changes))


@pytest.mark.parametrize("bounds", [[0, 5, 3, 10], [1, 10], [0, 11], [-1, 10]])
def test_packed_offsets_that_do_not_fit_never_reach_the_kernels(bounds):
    x = {name: getattr(arguments()[1], name)[:1] for name in ("query", "key", "value")}
    with pytest.raises(
        ValueError, match="cu_seqlens: expected offsets that rise from 0 to at most 10"
    ):
        attention(*arguments(**x, cu_seqlens=torch.tensor(bounds)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_logit": torch.zeros(2, 2, 9)}, r"key_logit: expected \[2, 2, 10\], got \[2, 2, 9\]"),
        (
            {"self_logit": torch.zeros(2, 3, 10)},
            r"self_logit: expected \[2, 4, 10\], got \[2, 3, 10\]",
        ),
        ({"first": torch.zeros(9, dtype=torch.bool)}, r"first: expected \[10\], got \[9\]"),
        ({"mean": torch.zeros(2, 2, 5)}, "mean: expected a log-sum and a mean, or neither"),
        (
            {"log_weight": torch.zeros(2, 2), "mean": torch.zeros(2, 2, 4)},
            r"mean: expected \[2, 2, 5\]",
        ),
        ({"span": 0}, "span: expected at least 1"),
    ],
)
def test_elita_that_does_not_fit_never_reaches_the_kernels(changes, message):
    given = {"key_logit": torch.zeros(2, 2, 10), "query_logit": torch.zeros(2, 4, 10)}
    given |= {"self_logit": torch.zeros(2, 4, 10), "value": torch.zeros(2, 2, 10, 5)}
    given |= {"span": 512} | changes
    spec = ElitaSpec(span=given.pop("span"), block=16)
    with pytest.raises(ValueError, match=message):
        elita("native", ElitaInputs(**given), spec)


@st.composite
def calls(draw):
    """Sizes around those of vectors, tiles, slabs and chunks; any strides; masks, packs, states,
    halves.
    """
    G = draw(st.integers(1, 3))
    x = {
        "B": draw(st.integers(0, 3)),
        "H": G * draw(st.integers(1, 3)),
        "G": G,
        "T": draw(st.sampled_from([0, 1, 2, 15, 16, 17, 47, 48, 49, 63, 64, 65, 130])),
        "K": draw(st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 33])),
        "V": draw(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 65, 129])),
        "order": draw(st.integers(0, 3)),
        "dtype": draw(
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        ),
        "is_causal": draw(st.booleans()),
        "chunk": draw(st.sampled_from([1, 7, 16, 48, 64])),
        "span": draw(st.sampled_from([1, 64, 10**9])),
        "threads": draw(st.integers(1, 4)),
        "strides": draw(st.sampled_from(["plain", "tokens first", "spread", "expanded"])),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }
    if x["K"] > 17 and x["order"] > 2:
        x["order"] = 2
    x["S"] = x["T"] if x["is_causal"] else draw(st.integers(0, 70))
    x["packed"] = x["is_causal"] and draw(st.booleans())
    return x


def laid_out(x, strides):
    if strides == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "spread":
        return torch.stack((x, torch.full_like(x, math.nan)), -1).flatten(-2)[..., ::2]
    if strides == "expanded" and x.shape[1]:
        return x[:, :1].expand(x.shape)
    return x


@pytest.mark.usefixtures("_threads")
@settings(max_examples=150, deadline=None)
@given(calls())
def test_fuzz(x):
    """Whatever the sizes, strides and threads: the float64 formula, outputs and gradients, and no
    byte out of place.
    """
    torch.manual_seed(x["seed"])
    torch.set_num_threads(x["threads"])
    B, dtype = (1 if x["packed"] else x["B"]), x["dtype"]
    shapes = (B, x["H"], x["T"], x["K"]), (B, x["G"], x["S"], x["K"]), (B, x["G"], x["S"], x["V"])
    q, k, v = (
        laid_out(torch.rand(shape).to(dtype), x["strides"]).requires_grad_() for shape in shapes
    )
    mask = torch.rand(B, x["S"]) > 0.3 if x["masked"] else None
    cuts = sorted(torch.randint(0, x["T"] + 1, (3,)).tolist())
    bounds = torch.tensor([0, *cuts]) if x["packed"] else None
    activation = "elu" if x["order"] == 0 else "identity"
    spec = AttentionSpec(
        x["order"], True, activation, 0.5, True, x["is_causal"], True, x["chunk"], x["span"]
    )
    out, _, S, Z = attention("native", AttentionInputs(q, k, v, mask, bounds), spec)
    wide = [y.detach().double().requires_grad_() for y in (q, k, v)]
    rest = {
        "is_causal": x["is_causal"],
        "scale": 0.5,
        "key_mask": mask,
        "cu_seqlens": bounds,
        "impl": "torch",
    }
    if x["order"]:
        exact, state = cm.taylor_attention(*wide, x["order"], return_state=True, **rest)
    else:
        exact, state = cm.linear_attention(*wide, return_state=True, **rest)
    for actual, wanted in ((out, exact), (S, state.numerator), (Z, state.denominator)):
        assert actual.shape == wanted.shape
        assert error(actual, wanted) < 20 * TOLERANCE[dtype]
    if out.numel():
        for actual, wanted in zip(gradients((out,), (q, k, v)), gradients((exact,), wide)):
            if wanted.numel():
                assert (actual.double() - wanted).abs().max() < 20 * TOLERANCE[dtype] * (
                    terms(x) + wanted.abs().max()
                )


def terms(x) -> float:
    """Size of what gradients are summed from. In both directions every query reads S keys with
    weights of about 1 / S. So the gradient of one of few keys sums many large terms; where they
    cancel, their rounding errors are left.
    """
    return 1.0 if x["is_causal"] else max(1.0, (x["T"] * x["H"] / x["G"]) ** 0.5 / max(x["S"], 1))


@st.composite
def grouped_calls(draw):
    """Mixed chunks and ELiTA: groups shorter and longer than a block, states that stand in
    mid-group.
    """
    G = draw(st.integers(1, 2))
    return {
        "op": draw(st.sampled_from(["mixed", "elita"])),
        "B": draw(st.integers(1, 3)),
        "H": G * draw(st.integers(1, 2)),
        "G": G,
        "T": draw(st.sampled_from([0, 1, 3, 16, 63, 64, 65, 150])),
        "before": draw(st.sampled_from([0, 1, 7, 64, 70])),
        "K": draw(st.sampled_from([1, 3, 16, 17])),
        "L": draw(st.sampled_from([1, 4, 16, 19])),
        "V": draw(st.sampled_from([1, 8, 15, 16, 64, 65, 130])),
        "size": draw(st.sampled_from([1, 5, 16, 64, 65, 128, 256])),
        "dtype": draw(
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        ),
        "is_causal": draw(st.booleans()),
        "reduced": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, 1, "H"])),
        "activation": draw(st.sampled_from(["relu2", "laplace"])),
        "threads": draw(st.integers(1, 4)),
        "strides": draw(st.sampled_from(["plain", "tokens first", "spread", "expanded"])),
        "masked": draw(st.booleans()),
        "packed": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def run_grouped(x, tensors, bias, mask, bounds, impl):
    """Output and state of the call, after a state of earlier tokens if it has one."""
    options = {"key_mask": mask, "cu_seqlens": bounds, "impl": impl}
    before = x["before"]
    if x["op"] == "elita":
        parts = [y[..., 0] for y in tensors[:3]] + [tensors[4]]
        op, rest, stateful = cm.elita_attention, {}, True
    else:
        parts, op, stateful = tensors, cm.mixed_chunk_attention, x["is_causal"]
        rest = {
            "group_size": x["size"],
            "is_causal": x["is_causal"],
            "activation": x["activation"],
            "bias": bias,
        }
        rest["reduce_group_non_causal_attn"] = x["reduced"]
    if not stateful:
        return (op(*parts, **rest, **options),)
    state = None
    if before and bounds is None:
        early = (
            [y[:, :, :1].repeat(1, 1, before, *[1] * (y.dim() - 3)) for y in parts]
            if x["T"]
            else None
        )
        state = None if early is None else op(*early, **rest, impl=impl, return_state=True)[1]
    out, state = op(*parts, **rest, **options, state=state, return_state=True)
    return out, *(y for y in state.tensors().values() if y.is_floating_point())


@pytest.mark.usefixtures("_threads")
@settings(max_examples=80, deadline=None)
@given(grouped_calls())
def test_fuzz_groups(x):
    torch.manual_seed(x["seed"])
    torch.set_num_threads(x["threads"])
    B, dtype = (1 if x["packed"] else x["B"]), x["dtype"]
    sizes = (
        (x["H"], x["K"]),
        (x["G"], x["K"]),
        (x["H"], x["L"]),
        (x["G"], x["L"]),
        (x["G"], x["V"]),
    )
    if x["op"] == "elita":
        sizes = ((x["G"], 1), (x["H"], 1), (x["H"], 1), (x["G"], 1), (x["G"], x["V"]))
    tensors = [
        laid_out(torch.rand(B, h, x["T"], d).to(dtype), x["strides"]).requires_grad_()
        for h, d in sizes
    ]
    heads = {None: 0, 1: 1, "H": x["H"]}[x["bias"]]
    bias = torch.rand(heads, x["size"], x["size"]).to(dtype).requires_grad_() if heads else None
    mask = torch.rand(B, x["T"]) > 0.3 if x["masked"] else None
    bounds = (
        torch.tensor([0, *sorted(torch.randint(0, x["T"] + 1, (3,)).tolist())])
        if x["packed"]
        else None
    )
    wide = [y.detach().double().requires_grad_() for y in tensors]
    wide_bias = None if bias is None else bias.detach().double().requires_grad_()
    found = run_grouped(x, tensors, bias, mask, bounds, "native")
    exact = run_grouped(x, wide, wide_bias, mask, bounds, "torch")
    for actual, wanted in zip(found, exact):
        assert actual.shape == wanted.shape
        assert error(actual, wanted) < 20 * TOLERANCE[dtype]
    used = [0, 1, 2, 4] if x["op"] == "elita" else range(5)
    leaves = [tensors[i] for i in used] + (
        [bias] if bias is not None and x["op"] == "mixed" else []
    )
    wide_leaves = [wide[i] for i in used] + (
        [wide_bias] if bias is not None and x["op"] == "mixed" else []
    )
    if not found[0].numel():
        return
    for actual, wanted in zip(gradients(found[:1], leaves), gradients(exact[:1], wide_leaves)):
        if wanted.numel():
            assert (actual.double() - wanted).abs().max() < 20 * TOLERANCE[dtype] * (
                1 + wanted.abs().max()
            )


# ---- installation ----


def test_installation_without_a_compiler(tmp_path):
    """It succeeds; the kernels are missing, with the reason, and everything else works."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(
        ROOT / "src",
        project / "src",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"),
    )
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
        project,
    ]
    subprocess.run(
        [str(x) for x in command],
        check=True,
        capture_output=True,
        env=os.environ | {"CXX": "/nonexistent/c++"},
    )
    script = """
import torch, cumulant as cm
q, k, v = (torch.randn(1, 2, 30, 4) for _ in range(3))
print(cm.__file__)
print(cm.explain(cm.taylor_attention, q, k, v).impl, cm.taylor_attention(q, k, v).shape)
try:
    cm.taylor_attention(q, k, v, impl="native")
except ValueError as e:
    print(e)
"""
    done = run(script, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    where, chosen, message = done.stdout.splitlines()
    assert where.startswith(str(target))
    assert chosen == "torch torch.Size([1, 2, 30, 4])"
    assert (
        "its kernels were not compiled: no C++ compiler (GCC, Clang) when cumulant was installed"
        in message
    )
    assert "these work: 'torch', 'reference'" in message
