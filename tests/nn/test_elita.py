"""ELiTA's layers against loops over tokens and heads; horizons; memory for the backward pass."""

import math

import pytest
import torch

from cumulant import nn
from cumulant.kernels import bilinear as kernel
from cumulant.ops.bilinear import bilinear

from .common import assert_agree

D, H, V, M = 12, 3, 5, 4


def layer(**options):
    torch.manual_seed(0)
    module = nn.ElitaAttention(D, H, head_dim=V, features=M, **{"horizon": 10, **options}).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def position_logit(module, h, n, tau):
    p = module.position
    a, b = (getattr(p, f"{name}{n}")[h] for name in "ab")
    return sum(float(c * torch.sin(x * tau + y)) for c, x, y in zip(p.c[h], a, b))


def formula(module, x, horizon, time=1.0):
    """The softmax, row by row, over keys up to i and over the token itself."""
    k = module.logit_proj.weight.view(-1, H, D)
    values = module.v_proj.weight.view(H, V, D)
    out = torch.zeros_like(x)
    for h in range(H):
        heads = []
        for i in range(len(x)):
            r = position_logit(module, h, 2, time * i / horizon) + (
                float(k[2, h] @ x[i]) if len(k) == 3 else 0.0
            )
            c = [
                float(k[0, h] @ x[j]) + position_logit(module, h, 1, time * j / horizon)
                for j in range(i + 1)
            ]
            logits = torch.tensor([r + z for z in c] + [float(k[1, h] @ x[i])], dtype=x.dtype)
            chosen = torch.stack([values[h] @ x[j] for j in (*range(i + 1), i)])
            heads.append(logits.softmax(0) @ chosen)
        out += torch.stack(heads) @ module.out_proj.weight[:, h * V : (h + 1) * V].T
    return out


@pytest.mark.parametrize("query_logit", [True, False])
@pytest.mark.parametrize("time", [1.0, 2.5])
def test_attention_is_its_formula(query_logit, time):
    """Also beyond the horizon, where positions go on along the same sines."""
    module = layer(query_logit=query_logit, time=time)
    x = torch.randn(1, 25, D, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(module(x)[0], formula(module, x[0], 10, time), atol=1e-12)


def test_horizon_none_is_the_sequence_s_own_length():
    module = layer(horizon=None)
    for T in (1, 2, 9):
        x = torch.randn(1, T, D, dtype=torch.float64)
        with torch.no_grad():
            assert torch.allclose(module(x)[0], formula(module, x[0], max(T - 1, 1)), atol=1e-12)


def test_generating_past_the_horizon_is_the_whole():
    """Steps to three times the horizon equal the whole, because the state counts tokens."""
    module = layer()
    x = torch.randn(2, 30, D, dtype=torch.float64)
    state, outs = None, []
    for t in range(30):
        y, state = module(x[:, t : t + 1], state=state, return_state=True)
        outs.append(y)
    assert_agree([torch.cat(outs, 1)], [module(x)])
    assert state.position.tolist() == [30, 30]


def test_a_raised_horizon_reads_positions_closer_together():
    """With twice the horizon, token 2j has the position that j had."""
    near, far = nn.SinusoidalLogits(H, M, horizon=10), nn.SinusoidalLogits(H, M, horizon=20)
    far.load_state_dict(near.state_dict())
    place = torch.arange(8)
    assert_agree(far(2 * place), near(place))
    slower = nn.SinusoidalLogits(H, M, horizon=10, time=0.5)
    slower.load_state_dict(near.state_dict())
    assert_agree(slower(2 * place), near(place))


def test_positions_are_exact_far_out():
    """At 10 million tokens fp32 parameters give the sines of fp64."""
    module = nn.SinusoidalLogits(2, 3, horizon=1000.0)
    wide = nn.SinusoidalLogits(2, 3, horizon=1000.0).double()
    wide.load_state_dict(module.state_dict())
    place = torch.tensor([0, 999, 123_457, 9_999_991])
    assert_agree([x.double() for x in module(place)], wide(place), atol=1e-4)


def test_state_size():
    """It is H · (V + 1) numbers and a count, whatever the length."""
    module = nn.ElitaAttention(64, 4).eval()
    for T in (1, 1000):
        _, state = module(torch.randn(1, T, 64), return_state=True)
        assert sum(x.numel() for x in (state.log_weight, state.mean)) == 4 * (16 + 1)
        assert state.nbytes == 4 * (16 + 1) * 8 + 8


def test_feed_forward_is_its_formula():
    torch.manual_seed(0)
    module = nn.ElitaFeedForward(D, 7, factor=3).double()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    swish = lambda z: z / (1 + torch.exp(-z))  # noqa: E731
    a = swish(x @ module.hidden_proj.weight.T + module.hidden_proj.bias)
    b = swish(x @ module.factor_proj.weight.T + module.factor_proj.bias)
    w = module.out_proj.weight.view(D, 3, 7)
    expected = torch.zeros_like(x)
    for i in range(7):
        for j in range(3):
            expected += (a[..., i] * b[..., j])[..., None] * w[:, j, i]
    assert torch.allclose(module(x), expected + module.out_proj.bias, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0,), (2, 0, 4)], ids=str)
def test_bilinear_gradients(shape, monkeypatch):
    """Finite differences, over several blocks of tokens, and none."""
    monkeypatch.setattr(kernel, "BLOCK", 25)
    a, b = torch.randn(*shape, 4, dtype=torch.float64), torch.randn(*shape, 3, dtype=torch.float64)
    w, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (a, b, w, bias)]
    expected = torch.einsum("...i,...f,dfi->...d", a, b, w.view(5, 3, 4)) + bias
    out = bilinear(*leaves)
    assert out.shape == (*shape, 5)
    assert torch.allclose(out, expected)
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    assert_agree(grads, torch.autograd.grad(expected.sin().sum(), leaves))
    assert torch.autograd.gradcheck(bilinear, leaves)
    flat = [x.detach().reshape(-1, x.shape[-1]).requires_grad_() for x in (a, b)]
    torch.library.opcheck(kernel.bilinear, (*flat, w))


@pytest.mark.parametrize("length", [3, 4000])
def test_bilinear_in_blocks_at_full_size(length):
    """Fast matrix products in fp32, and bf16, against fp64."""
    torch.manual_seed(0)
    a, b, w = torch.randn(length, 64), torch.randn(length, 8), torch.randn(64, 512)
    exact = torch.einsum("ni,nf,dfi->nd", a.double(), b.double(), w.view(64, 8, 64).double())
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        out = bilinear(a.to(dtype), b.to(dtype), w.to(dtype))
        assert out.dtype == dtype
        assert float((out.double() - exact).norm() / exact.norm()) < bound
    with torch.autocast("cpu", torch.bfloat16):
        low = bilinear(a, b, w)
    assert low.dtype == torch.bfloat16


def test_the_feed_forward_keeps_no_outer_products():
    """It keeps its input and two projections; the hidden layer would be 8 times as large."""
    module = nn.ElitaFeedForward(64)
    x = torch.randn(4, 500, 64, requires_grad=True)
    kept = {}

    def note(y):
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
        y = module(x)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    used = sum(size for where, size in kept.items() if where not in weights)
    assert used <= 4 * 500 * (64 + 2 * 64 + 2 * 8) * 4
    assert y.shape == x.shape


def test_the_feed_forward_compiles_and_exports():
    module = nn.ElitaFeedForward(D, 7, factor=3)
    x = torch.randn(2, 9, D)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), atol=1e-6)
    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: length},))
    longer = torch.randn(2, 30, D)
    assert torch.allclose(program.module()(longer), module(longer), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.ElitaAttention(D, H, horizon=0),
            "horizon: expected a number of positions above 0, got 0",
        ),
        (
            lambda: nn.ElitaAttention(D, H, horizon=-5.0),
            "horizon: expected a number of positions above 0, got -5.0",
        ),
        (lambda: nn.ElitaAttention(D, H, horizon=math.inf), "horizon: expected .* got inf"),
        (lambda: nn.SinusoidalLogits(H, horizon=True), "horizon: expected .* got True"),
        (lambda: nn.SinusoidalLogits(H, time=math.nan), "time: expected a finite number, got nan"),
        (lambda: nn.SinusoidalLogits(H, 0), "features: expected at least 1, got 0"),
        (
            lambda: nn.ElitaAttention(D, 5),
            "num_heads: 5 must divide dim=12, or head_dim must be given",
        ),
        (lambda: nn.ElitaAttention(D, H, head_dim=0), "head_dim: expected at least 1, got 0"),
        (lambda: nn.ElitaAttention(D, H, clip=0), "clip: expected a number above 0 or None, got 0"),
        (lambda: nn.ElitaFeedForward(D, factor=0), "factor: expected at least 1, got 0"),
        (
            lambda: nn.ElitaFeedForward(D)(torch.zeros(2, 5)),
            r"x: expected \[..., D\] with D=12, got \[2, 5\]",
        ),
        (
            lambda: layer(horizon=None)(torch.zeros(1, 3, D).double(), return_state=True),
            "give a horizon",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_logits_that_overflowed_are_refused_by_name():
    module = layer()
    with torch.no_grad():
        module.logit_proj.weight[:H] = math.nan
    with pytest.raises(
        ValueError, match="key_logit: expected logits below .* got nan; an earlier layer may have"
    ):
        module(torch.ones(1, 4, D, dtype=torch.float64))
