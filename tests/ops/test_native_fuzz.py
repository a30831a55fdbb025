"""Native kernels on drawn sizes, strides, masks and states, against plain PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cumulant as cm
from cumulant.kernels.operators.attention import call_attention
from cumulant.kernels.spec import AttentionInputs, AttentionSpec

from .cases import TOLERANCE, error
from .native_calls import gradients

pytestmark = pytest.mark.usefixtures("small_grains")


@st.composite
def calls(draw):
    """Sizes around those of vectors, tiles and chunks, with any strides, masks and dtypes."""
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
        "decays": draw(st.sampled_from([None, 0.0, -0.01, -3.0, -200.0])),
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


@pytest.mark.usefixtures("kept_threads")
@settings(max_examples=150, deadline=None)
@given(calls())
def test_fuzz(x):
    """Outputs and gradients equal the float64 formula, and no byte outside is written."""
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
    logs = random_decays(x, B)
    leaves = [q, k, v] if logs is None else [q, k, v, logs]
    activation = "elu" if x["order"] == 0 else "identity"
    spec = AttentionSpec(
        x["order"], True, activation, 0.5, True, x["is_causal"], True, x["chunk"], x["span"]
    )
    given = AttentionInputs(q, k, v, mask, bounds, log_decay=logs)
    out, _, S, Z = call_attention("native", given, spec)
    wide = [y.detach().double().requires_grad_() for y in leaves]
    rest = {
        "log_decay": wide[3] if logs is not None else None,
        "is_causal": x["is_causal"],
        "scale": 0.5,
        "key_mask": mask,
        "cu_seqlens": bounds,
        "impl": "torch",
    }
    if x["order"]:
        exact, state = cm.taylor_attention(*wide[:3], x["order"], return_state=True, **rest)
    else:
        exact, state = cm.linear_attention(*wide[:3], return_state=True, **rest)
    for actual, wanted in ((out, exact), (S, state.numerator), (Z, state.denominator)):
        assert actual.shape == wanted.shape
        assert error(actual, wanted) < 20 * tolerance(x)
    if out.numel():
        for actual, wanted in zip(gradients((out,), leaves), gradients((exact,), wide)):
            if wanted.numel():
                assert (actual.double() - wanted).abs().max() < 20 * tolerance(x) * (
                    terms(x) + wanted.abs().max()
                )


def tolerance(x) -> float:
    """Of the dtype, and of differences of running sums of a chunk's log decays in fp64."""
    return TOLERANCE[x["dtype"]] + 64 * abs(x["decays"] or 0) * 2.0**-53


def random_decays(x, B):
    """Log decays down to x["decays"], with heads or tokens as rows; None if there are none."""
    if x["decays"] is None or not x["is_causal"]:
        return None
    dtype = torch.float64 if x["dtype"] is torch.float64 else torch.float32
    logs = x["decays"] * torch.rand(B, x["T"], x["G"], dtype=dtype) ** 4
    return (logs.mT if x["strides"] == "plain" else logs.mT.contiguous()).requires_grad_()


def terms(x) -> float:
    """The size of the terms that gradients are summed from.

    In both directions every query reads S keys with weights of about 1 / S. So the gradient of
    one of few keys sums many large terms; where they cancel, their rounding errors are left.
    """
    return 1.0 if x["is_causal"] else max(1.0, (x["T"] * x["H"] / x["G"]) ** 0.5 / max(x["S"], 1))


@st.composite
def grouped_calls(draw):
    """Mixed chunks and ELiTA: groups shorter and longer than a block, states within a group."""
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


@pytest.mark.usefixtures("kept_threads")
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
