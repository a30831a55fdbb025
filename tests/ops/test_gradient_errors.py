"""Errors of outputs and gradients in every dtype, as multiples of the reference's own error.

The exact result is the reference's in fp64 on the same rounded inputs. The reference in fp32, bf16
or fp16 computes the plain quadratic form in fp32 and rounds its results, so its error is what the
dtype itself costs. Errors are root mean squares over several draws: of one draw, where most of a
gradient cancels, an error says little.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cumulant as cm
from cumulant.ops import pointwise

from .cases import CASES, CHUNK, GRADIENT_TOLERANCE, ROUNDING, Case, by_fast_impl, error
from .walking import walk

DRAWS = 4
# Triton's kernels round the factors of products to the inputs' dtype, as tensor cores take them. So
# they may have this many times the others' errors, in outputs and gradients of q, k and v. relu has
# the largest of q: most of its gradients cancel.
TENSOR_CORES = torch.tensor([1.1, 5.5, 2.0, 1.2])
by_dtype = pytest.mark.parametrize("dtype", list(GRADIENT_TOLERANCE), ids=str)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    walk(monkeypatch, chunk=CHUNK, span=CHUNK, block=CHUNK, elita_span=1, elita_chunk=4)


def differentiate(
    case: Case, inputs: list[Tensor], weight: Tensor, is_causal: bool, impl: str
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = case(*leaves, is_causal=is_causal, impl=impl)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]


@by_fast_impl
@by_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_outputs_and_gradients_are_as_exact_as_the_references(
    case: Case, dtype: torch.dtype, impl: str
):
    for is_causal in (True, False)[: 1 + case.bidirectional]:
        squares = {name: torch.zeros(4, dtype=torch.float64) for name in ("reference", impl)}
        for seed in range(DRAWS):
            inputs = [x.to(dtype) for x in case.inputs(1, 2, 70, 6, 8, G=1, seed=seed)]
            weight = torch.randn(
                1, 2, 70, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            exact = differentiate(
                case, [x.double() for x in inputs], weight, is_causal, "reference"
            )
            for name, total in squares.items():
                found = differentiate(case, inputs, weight, is_causal, name)
                total.add_(
                    torch.tensor([error(a, b) ** 2 for a, b in zip(found, exact, strict=True)])
                )
        bound = GRADIENT_TOLERANCE[dtype] * (squares["reference"] / DRAWS).sqrt().clamp(
            min=ROUNDING[dtype]
        )
        if impl == "triton" and dtype != torch.float32:
            bound *= TENSOR_CORES
        for name, total in squares.items():
            found = (total / DRAWS).sqrt()
            assert (found <= bound).all(), (name, is_causal, (found / bound).tolist())


def _by_convolution(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.mT, (weight.shape[0] - 1, 0))
    return F.conv1d(padded, weight.flip(0).T[:, None], groups=x.shape[-1]).mT


def _by_mean(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _angles() -> tuple[Tensor, Tensor]:
    angle = torch.linspace(0, 50, 300 * 8).view(300, 8)
    return angle.cos(), angle.sin()


def _by_complex(x: Tensor) -> Tensor:
    cosine, sine = _angles()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(
        cosine.double(), sine.double()
    )
    return torch.view_as_real(pairs).flatten(-2)


@by_dtype
@pytest.mark.parametrize(
    ("operation", "formula", "shapes", "roundings"),
    [
        (pointwise.short_convolution, _by_convolution, [(2, 300, 16), (4, 16)], 1),
        (
            pointwise.swiglu,
            lambda x, up: F.silu(x) * up,
            [(2, 300, 16)] * 2,
            2,
        ),  # silu(x), and its product
        (lambda x, w: pointwise.rms_norm(x, w, 1e-6), _by_mean, [(2, 300, 16), (16,)], 1),
        (
            lambda x, _: pointwise.rotate_pairs(x[:, None], *_angles()),
            lambda x, _: _by_complex(x),
            [(2, 300, 16), (1,)],
            1,
        ),
    ],
    ids=["short_convolution", "swiglu", "rms_norm", "turn"],
)
def test_operations_beside_attention(
    operation, formula, shapes, roundings: int, dtype: torch.dtype
):
    """These round once for every operation of their formula, and add halves in fp32."""
    generator = torch.Generator().manual_seed(0)
    narrow = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    y, exact = operation(*narrow), formula(*wide)
    dout = torch.randn(exact.shape, generator=generator).to(dtype)
    found = torch.autograd.grad(y, narrow, dout.view(y.shape), allow_unused=True)
    expected = torch.autograd.grad(exact, wide, dout.double(), allow_unused=True)
    for a, b in zip((y.view(exact.shape), *found), (exact, *expected), strict=True):
        if b is not None:
            assert a.dtype == dtype
            assert error(a, b) <= 1.2 * roundings**0.5 * (
                ROUNDING[dtype] if dtype != torch.float32 else 3e-7
            )


@by_dtype
@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("lengths", [[35, 35], [1] * 20], ids=["halves", "steps"])
def test_gradients_through_states(impl: str, lengths: list[int], dtype: torch.dtype):
    """States are fp32, so a sequence in parts errs no more than the whole."""
    for case in [
        c for c in CASES if c.name in ("taylor-2", "linear-elu", "mixed-laplace", "elita-own")
    ]:
        T, squares = sum(lengths), torch.zeros(2, 4, dtype=torch.float64)
        for seed in range(DRAWS):
            inputs = [x.to(dtype) for x in case.inputs(1, 2, T, 6, 8, G=1, seed=seed)]
            weight = torch.randn(
                1, 2, T, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            exact = differentiate(case, [x.double() for x in inputs], weight, True, "reference")
            whole = differentiate(case, inputs, weight, True, "reference")
            leaves = [x.clone().requires_grad_() for x in inputs]
            state: cm.State | None = None
            outs = []
            for part in zip(*(x.split(lengths, 2) for x in leaves), strict=True):
                out, state = case(*part, is_causal=True, state=state, return_state=True, impl=impl)
                outs.append(out)
            out = torch.cat(outs, 2)
            found = [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]
            for total, results in zip(squares, (found, whole), strict=True):
                total.add_(
                    torch.tensor([error(a, b) ** 2 for a, b in zip(results, exact, strict=True)])
                )
        found, own = (squares / DRAWS).sqrt()
        assert (found <= GRADIENT_TOLERANCE[dtype] * own.clamp(min=ROUNDING[dtype])).all(), (
            case.name,
            found / own,
        )
