"""Matrices of 8 and 4 bits: how well they are rounded, and products on every instruction set."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cumulant.kernels import quantized as formula
from cumulant.kernels.native import library
from cumulant.kernels.native import quantized as native
from cumulant.kernels.native.program import Program, Unsuitable
from cumulant.ops.quantized import quantize

from .cases import TOLERANCE, error

BITS = (8, 4)
# of products, over the largest; with VNNI vectors have 16 bits
ROUNDED = 3e-5  # of products with inputs of 16 bits, as docs/quantization.md says
EXACT = {name: 1e-4 if name.endswith("vnni") else 1e-6 for name in library.INSTRUCTIONS}


class Wrapped(torch.Tensor):
    """A subclass of tensors."""


def multiply(matrix, x, bias=None, to=None):
    """The product by a program; with `to`, added to that vector of x."""
    p = Program(x.shape[-1])
    y = p.quantized_matrix(p.input, *matrix[:3], bias, to and p.input, add=to is not None)
    p.set_output(y)
    return p.run(x.contiguous(), [], None)[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_no_other_scale_is_much_better(bits, scale):
    """Errors are those of the best of 1,802 scales, each with its nearest codes, or hardly more."""
    weight = torch.randn(40, 64, dtype=torch.float64)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = weight.abs().amax(1, keepdim=True)
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for step in torch.linspace(0.4, 1.3, 901, dtype=torch.float64):
        for sign in (1, -1):
            s = sign * step * largest / most
            found = (weight / s).round().clamp(least, most) * s
            best = torch.minimum(best, (found - weight).square().sum(1))
    own = quantize((weight * scale).float(), bits).dequantize().double() / scale
    errors = (own - weight).square().sum(1)
    assert (errors <= best * (1.1 if bits == 4 else 1.2)).all()
    assert errors.sum() <= best.sum() * (1.005 if bits == 4 else 1.02)


@pytest.mark.parametrize("bits", BITS)
def test_codes_fill_their_bytes_as_documented(bits):
    weight = torch.randn(3, 70)
    codes, scales, _, k = quantize(weight, bits)
    assert codes.dtype == torch.uint8
    assert scales.dtype == torch.float32
    assert codes.shape == (3, 128 if bits == 8 else 64)
    assert scales.shape == (3, 2)
    assert k == 70
    for i in range(70):
        group, place = divmod(i, 64)
        if bits == 8:
            code = codes[:, 64 * group + place].int() - 128
        else:
            byte = codes[:, 32 * group + place % 32].int()
            code = (byte >> 4 if place >= 32 else byte & 15) - 8
        assert torch.equal(
            code * scales[:, group], formula.dequantize(codes, scales, bits, k)[:, i]
        )


@pytest.mark.parametrize("bits", BITS)
def test_what_is_exact_stays_exact(bits):
    """Zeros, and groups whose numbers are of one size or zero."""
    for weight in (torch.zeros(2, 70), torch.full((2, 70), -0.3), torch.eye(5)):
        found = quantize(weight, bits).dequantize()
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(BITS), st.integers(0, 99))
def test_native_and_torch_decode_alike(n, k, bits, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    codes, scales, *_ = quantize(weight, bits)
    expected = formula.dequantize(codes, scales, bits, k)
    assert torch.equal(native.dequantize(codes, scales, bits, k), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (33, 64), (40, 208), (64, 192), (130, 1000)])
def test_products_on_every_instruction_set(isa, bits, sizes):
    n, k = sizes
    matrix, bias = quantize(torch.randn(n, k), bits), torch.randn(n)
    exact = matrix.dequantize().double()
    assert torch.equal(native.dequantize(*matrix), formula.dequantize(*matrix))
    for rows in (1, 3, 16):
        x = torch.randn(rows, 1, k)
        assert error(multiply(matrix, x), x[:, 0].double() @ exact.T) < EXACT[isa]
        expected = x[:, 0].double() @ exact.T + bias.double()
        assert error(multiply(matrix, x, bias), expected) < EXACT[isa]
        if n == k:
            expected = x[:, 0].double() @ exact.T + x[:, 0].double()
            assert error(multiply(matrix, x, to=True), expected) < EXACT[isa]


@pytest.mark.parametrize("bits", BITS)
def test_vectors_of_any_size(isa, bits):
    """Each group has its own factor, so small groups beside large ones keep their precision."""
    matrix = quantize(torch.randn(20, 192), bits)
    exact = matrix.dequantize().double()
    for sizes in ((1e-20, 1, 1e20), (0, 0, 0), (1e-38, 0, 1e-36), (1e25, 1e25, 1e25)):
        x = torch.randn(1, 1, 192) * torch.tensor(sizes).repeat_interleave(64)
        y, expected = multiply(matrix, x), x[:, 0].double() @ exact.T
        assert y.isfinite().all()
        assert (y - expected).abs().max() <= EXACT[isa] * expected.abs().max() + 1e-34
    small = torch.randn(1, 1, 192)
    small[..., :64] *= 1e-3
    masked = matrix._replace(scales=matrix.scales * torch.tensor([1.0, 0, 0]))
    expected = small[:, 0].double() @ masked.dequantize().double().T
    assert error(multiply(masked, small), expected) < EXACT[isa]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_wrong_numbers_are_not_hidden(isa, bits, wrong):
    x = torch.randn(2, 1, 100)
    x[0, 0, 70] = wrong
    y = multiply(quantize(torch.randn(9, 100), bits), x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_matrices_of_one_vector_may_have_different_bits(bits):
    x, plain = torch.randn(2, 1, 96), torch.randn(40, 96)
    matrices = [quantize(torch.randn(40, 96), b) for b in (bits, 4, 8)]
    p = Program(96)
    whole = p.vector(160)
    parts = whole.split(40, 40, 40, 40)
    p.quantized_matrix(p.input, *matrices[0][:3], to=parts[0])
    p.matrix(p.input, plain, to=parts[1])
    p.quantized_matrix(p.input, *matrices[1][:3], to=parts[2])
    p.quantized_matrix(p.input, *matrices[2][:3], to=parts[3])
    p.set_output(whole)
    weights = (matrices[0].dequantize(), plain, matrices[1].dequantize(), matrices[2].dequantize())
    expected = x[:, 0].double() @ torch.cat(weights).double().T
    assert error(p.run(x, [], None)[0], expected) < 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_many_tokens(isa, bits):
    """With and without gradients, in every dtype."""
    matrix, bias = quantize(torch.randn(30, 100), bits), torch.randn(30)
    exact = matrix.dequantize().double()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(2, 5, 100).to(dtype)
        expected = x.double() @ exact.T
        bound = TOLERANCE[dtype] * 3
        if dtype == torch.float32 and isa == "avx512vnni":
            bound = ROUNDED
        assert matrix.multiply(x).dtype == dtype
        assert error(matrix.multiply(x), expected) < bound
        biased = matrix.multiply(x, bias.to(dtype))
        assert error(biased, expected + bias.double()) < bound
    x = torch.randn(2, 5, 100, requires_grad=True)
    upstream = torch.randn(2, 5, 30)
    matrix.multiply(x, bias).backward(upstream)
    assert error(x.grad, upstream.double() @ exact) < 1e-6
    assert matrix.multiply(torch.randn(0, 100)).shape == (0, 30)
    with torch.inference_mode():
        inside = matrix.multiply(x.detach())
    assert torch.equal(inside, matrix.multiply(x.detach()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sizes", [(1, 1), (33, 64), (40, 208), (64, 192), (100, 3000)])
def test_tokens_multiply_codes(isa, bits, sizes):
    """Tiles and panels that are full or not, and more tokens than are prepared at a time."""
    n, k = sizes
    matrix, bias = quantize(torch.randn(n, k), bits), torch.randn(n)
    exact = matrix.dequantize().double()
    bound = ROUNDED if isa == "avx512vnni" else 1e-6
    for tokens in (1, 5, 6, 13, 300):
        x = torch.randn(tokens, k)
        expected = x.double() @ exact.T
        y = native.multiply(x, *matrix)
        assert error(y, expected) < bound
        assert error(native.multiply(x, *matrix, bias), expected + bias.double()) < bound
        alone = torch.cat([native.multiply(row[None], *matrix) for row in x[:7]])
        assert torch.equal(y[:7], alone)  # a token's outputs do not depend on the others
        assert error(multiply(matrix, x[:3, None]), y[:3].double()) < 1e-6  # as one token's


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_wrong_numbers_of_one_token_stay_its_own(isa, bits, wrong):
    x = torch.randn(9, 100)
    x[4, 70] = wrong
    y = quantize(torch.randn(40, 100), bits).multiply(x)
    assert not y[4].isfinite().any()
    assert y[[i for i in range(9) if i != 4]].isfinite().all()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_defaults_of_torch_change_nothing(default):
    matrix, x = quantize(torch.randn(400, 100), 8), torch.randn(30, 100)
    expected, weights = matrix.multiply(x), matrix.dequantize()
    try:
        if default == "meta":
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found, decoded = matrix.multiply(x), matrix.dequantize()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, expected)
    assert torch.equal(decoded, weights)


def test_a_bias_has_gradients():
    matrix, x = quantize(torch.randn(40, 100), 8), torch.randn(3, 100)
    bias = torch.randn(40, requires_grad=True)
    matrix.multiply(x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((40,), 3.0))


def test_autocast_changes_nothing(isa):
    matrix, x = quantize(torch.randn(40, 100), 8), torch.randn(3, 100)
    expected = matrix.multiply(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matrix.multiply(x), expected)


def test_codes_of_a_subclass_are_decoded():
    """Such as sharded ones, which have no memory of their own."""
    matrix, x = quantize(torch.randn(40, 100), 8), torch.randn(3, 100)
    wrapped = matrix._replace(codes=matrix.codes.as_subclass(Wrapped))
    assert error(wrapped.multiply(x), matrix.multiply(x).double()) < 1e-4


def test_no_tokens_in_a_thread_without_memory():
    matrix, found = quantize(torch.randn(30, 100), 8), []
    thread = threading.Thread(target=lambda: found.append(matrix.multiply(torch.zeros(0, 100))))
    thread.start()
    thread.join()
    assert found[0].shape == (0, 30)


def test_threads_share_a_product():
    matrix, x = quantize(torch.randn(500, 400), 4), torch.randn(70, 400)
    alone = matrix.multiply(x)
    torch.set_num_threads(3)
    assert torch.equal(matrix.multiply(x), alone)


def test_without_native_kernels(monkeypatch):
    matrix, x = quantize(torch.randn(30, 100), 4), torch.randn(3, 100)
    native_product = matrix.multiply(x)
    monkeypatch.setenv("CUMULANT_IMPL", "torch")
    product = matrix.multiply(x)
    assert error(product, x.double() @ matrix.dequantize().double().T) < 1e-6
    assert error(native_product, product.double()) < EXACT[library.instruction_set_name()]
    assert torch.equal(matrix.dequantize(), formula.dequantize(*matrix))


def test_errors():
    weight = torch.randn(4, 64)
    for bits in (3, 16, "8", 4.0, None, True):
        with pytest.raises(ValueError, match=r"bits: expected 8 or 4, got"):
            quantize(weight, bits)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="weight: holds NaN or infinity"):
            quantize(torch.full((2, 3), bad), 8)
    with pytest.raises(ValueError, match=r"expected a matrix \[n, k\] of floats, got torch.int64"):
        quantize(torch.ones(2, 2, dtype=torch.int64), 8)
    codes, scales, bits, k = quantize(weight, 8)
    with pytest.raises(ValueError, match="codes: expected contiguous"):
        native.dequantize(codes, scales, 4, k)
    with pytest.raises(ValueError, match="scales: expected contiguous"):
        native.dequantize(codes, scales.half(), 8, k)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        native.multiply(torch.ones(2, 0), codes[:, :0], scales[:, :0], 8, 0)
    p = Program(64)
    for args in ((codes, scales, 4), (codes, scales.double(), 8), (codes[:, :9], scales, 8)):
        with pytest.raises(Unsuitable):
            p.quantized_matrix(p.input, *args)
