"""Cross attention: its formula, splits, padding, contexts read many times, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cumulant import nn

from ..quick import slow_but
from .common import assert_agree, lowered

D, E = 24, 10  # channels of x and of the context
MIXERS = {
    "taylor": lambda: nn.TaylorAttention(D, 4, head_dim=6, context_dim=E, is_causal=False),
    "taylor-everything": lambda: nn.TaylorAttention(
        D,
        4,
        num_kv_heads=2,
        head_dim=6,
        value_dim=5,
        context_dim=E,
        is_causal=False,
        prenorm=True,
        qk_norm=True,
        gate_values=True,
        shift_tokens=True,
        bias=True,
    ),
    "taylor-multi-query": lambda: nn.TaylorAttention(
        D,
        4,
        num_kv_heads=1,
        head_dim=3,
        order=4,
        context_dim=E,
        is_causal=False,
        combine_heads=False,
    ),
    "linear": lambda: nn.LinearAttention(D, 4, context_dim=E, is_causal=False),
    "linear-everything": lambda: nn.LinearAttention(
        D,
        4,
        num_kv_heads=2,
        head_dim=5,
        context_dim=E,
        is_causal=False,
        prenorm=True,
        gate_values=True,
        shift_tokens=True,
        bias=True,
    ),
    "linear-softmax": lambda: nn.LinearAttention(
        D, 4, context_dim=E, is_causal=False, feature_map="softmax"
    ),
    "linear-hedgehog": lambda: nn.LinearAttention(
        D, 4, context_dim=E, is_causal=False, feature_map="hedgehog"
    ),
    "linear-rebased": lambda: nn.LinearAttention(
        D, 4, context_dim=E, is_causal=False, feature_map="rebased"
    ),
}


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(1)
    return MIXERS[request.param]().double()


def draw(*shape, requires_grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def gradients(mixer, y, *inputs):
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * weight).sum(), (*inputs, *mixer.parameters()))


def test_taylor_is_its_formula():
    """Weights 1 + s + s²/2 of every query on every visible token of the context, written out."""
    torch.manual_seed(0)
    mixer = MIXERS["taylor"]().double()
    x, context, mask = draw(2, 3, D), draw(2, 11, E), torch.rand(2, 11) > 0.4
    q = mixer.q_proj(x).view(2, 3, 4, 6)
    k, v = mixer.k_proj(context).view(2, 11, 4, 6), mixer.v_proj(context).view(2, 11, 4, 6)
    s = torch.einsum("bthk,bshk->bhts", q, k) / 6**0.5
    w = (1 + s + s**2 / 2) * mask[:, None, None]
    out = torch.einsum("bhts,bshv->bthv", w / w.sum(-1, keepdim=True), v)
    expected = mixer.out_proj(out.reshape(2, 3, 24))
    assert torch.allclose(mixer(x, context=context, context_mask=mask), expected, atol=1e-12)


def test_elu_is_its_formula():
    torch.manual_seed(0)
    mixer = MIXERS["linear"]().double()
    x, context = draw(2, 3, D), draw(2, 11, E)
    q = torch.nn.functional.elu(mixer.q_proj(x).view(2, 3, 4, 6)) + 1
    k = torch.nn.functional.elu(mixer.k_proj(context).view(2, 11, 4, 6)) + 1
    w = torch.einsum("bthk,bshk->bhts", q, k)
    out = torch.einsum(
        "bhts,bshv->bthv", w / w.sum(-1, keepdim=True), mixer.v_proj(context).view(2, 11, 4, 6)
    )
    assert torch.allclose(
        mixer(x, context=context), mixer.out_proj(out.reshape(2, 3, 24)), atol=1e-12
    )


def test_a_context_read_many_times(mixer):
    """A context that several queries read gives the same outputs, and gradients add up."""
    context = draw(2, 30, E, requires_grad=True)
    queries = [draw(2, n, D, requires_grad=True) for n in (1, 7, 0, 40)]
    state = mixer.encode_context(context)
    assert state.position.tolist() == [30, 30]
    outs = [mixer(x, state=state) for x in queries]
    expected = [mixer(x, context=context) for x in queries]
    assert_agree(outs, expected)
    together = gradients(mixer, torch.cat(outs, 1), context, *queries)
    assert_agree(together, gradients(mixer, torch.cat(expected, 1), context, *queries))


@pytest.mark.parametrize("cuts", [[1] * 30, [29, 1], [0, 12, 18]], ids=str)
def test_a_context_in_pieces(mixer, cuts):
    x, context = draw(2, 5, D, requires_grad=True), draw(2, 30, E, requires_grad=True)
    state = None
    for piece in context.split(cuts, 1):
        state = mixer.encode_context(piece, state=state)
    y, whole = mixer(x, context=context, return_state=True)
    assert_agree(state.sums.tensors().values(), whole.sums.tensors().values())
    y2 = mixer(x, state=state)
    assert_agree([y2], [y])
    assert_agree(gradients(mixer, y2, x, context), gradients(mixer, y, x, context))
    last = mixer(x, context=context[:, -3:], state=mixer.encode_context(context[:, :-3]))
    assert_agree([last], [y])


def test_queries_in_pieces(mixer):
    """The state also remembers the query before, which a token shift needs."""
    x, context = draw(2, 9, D), draw(2, 12, E)
    whole = mixer(x, context=context)
    state, outs = mixer.encode_context(context), []
    for piece in x.split([4, 1, 4], 1):
        y, state = mixer(piece, state=state, return_state=True)
        outs.append(y)
    assert_agree([torch.cat(outs, 1)], [whole])
    assert state.position.tolist() == [12, 12]  # tokens of the context; queries leave none


@pytest.mark.parametrize("junk", [float("nan"), 50.0])
def test_masked_tokens_do_not_exist(mixer, junk):
    """With padding in x and in the context, outputs and gradients are those of each row alone."""
    x, context = draw(3, 8, D), draw(3, 15, E)
    key_mask, context_mask = torch.rand(3, 8) > 0.4, torch.rand(3, 15) > 0.4
    key_mask[0, :3], context_mask[0, :7] = False, False
    key_mask[:, -1] = context_mask[:, -1] = True
    x[~key_mask], context[~context_mask] = junk, junk
    x.requires_grad_(), context.requires_grad_()
    y = mixer(x, context=context, key_mask=key_mask, context_mask=context_mask)
    assert not y[~key_mask].any()
    dx, dcontext, *found = torch.autograd.grad(y.square().sum(), (x, context, *mixer.parameters()))
    assert not dx[~key_mask].any()
    assert not dcontext[~context_mask].any()
    total = [torch.zeros_like(p) for p in mixer.parameters()]
    for b in range(3):
        xb = x[b][key_mask[b]][None].detach().requires_grad_()
        cb = context[b][context_mask[b]][None].detach().requires_grad_()
        yb = mixer(xb, context=cb)
        gx, gc, *parameters = torch.autograd.grad(yb.square().sum(), (xb, cb, *mixer.parameters()))
        assert_agree(
            [y[b][key_mask[b]], dx[b][key_mask[b]], dcontext[b][context_mask[b]]],
            [yb[0], gx[0], gc[0]],
        )
        total = [a + g for a, g in zip(total, parameters)]
    for actual, exact in zip(found, total):
        assert torch.allclose(actual, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["taylor", "linear", "linear-softmax"])
def test_nothing_to_see_is_zero(name):
    mixer = MIXERS[name]().double()
    x = draw(2, 4, D)
    assert not mixer(x, context=draw(2, 0, E)).any()
    mask = torch.tensor([[False] * 5, [True] * 5])
    y = mixer(x, context=draw(2, 5, E), context_mask=mask)
    assert not y[0].any()
    assert y[1].any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["taylor", "linear"])
def test_any_shape_mask_and_split(kind, data):
    """Drawn splits and masks of x and of its context give the results of each row alone."""
    B, G, R, K, V = (data.draw(st.integers(1, 3)) for _ in range(5))
    T, S = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 20))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    options = {
        "num_kv_heads": G,
        "head_dim": K,
        "value_dim": V,
        "context_dim": E,
        "is_causal": False,
    }
    options |= {
        name: data.draw(st.booleans(), label=name)
        for name in ("prenorm", "gate_values", "shift_tokens")
    }
    if kind == "taylor":
        mixer = nn.TaylorAttention(
            D, G * R, order=data.draw(st.sampled_from([2, 4])), **options
        ).double()
    else:
        maps = st.sampled_from(["elu", "relu", "softmax", "hedgehog", "rebased"])
        mixer = nn.LinearAttention(D, G * R, feature_map=data.draw(maps), **options).double()
    x, context = draw(B, T, D), draw(B, S, E)
    key_mask, context_mask = (
        torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=B * n, max_size=B * n)), dtype=torch.bool
        ).view(B, n)
        for n in (T, S)
    )
    state, at = None, 0
    for end in [*sorted(data.draw(st.lists(st.integers(0, S), max_size=3))), S]:
        state = mixer.encode_context(
            context[:, at:end], context_mask=context_mask[:, at:end], state=state
        )
        at = end
    outs, at = [], 0
    for end in [*sorted(data.draw(st.lists(st.integers(0, T), max_size=3))), T]:
        y, state = mixer(x[:, at:end], key_mask=key_mask[:, at:end], state=state, return_state=True)
        outs.append(y)
        at = end
    y = torch.cat(outs, 1)
    assert not y[~key_mask].any()
    for b in range(B):
        alone = mixer(x[b][key_mask[b]][None], context=context[b][context_mask[b]][None])
        assert torch.allclose(y[b][key_mask[b]], alone[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision(mixer, dtype):
    context = draw(2, 33, E)
    exact, y = lowered(mixer, dtype, draw(2, 9, D), context=context)
    assert float((y - exact).norm() / exact.norm()) < 0.015
    assert mixer.encode_context(context.to(dtype)).sums.numerator.dtype == torch.float32


@pytest.mark.parametrize(
    "mixer", slow_but(("taylor-everything", "linear-rebased"), MIXERS), indirect=True
)
@pytest.mark.filterwarnings("ignore")
def test_compile(mixer):
    torch._dynamo.reset()
    mixer = mixer.float()
    x, context = torch.randn(2, 12, D), torch.randn(2, 20, E)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, context=context), mixer(x, context=context), atol=1e-5)
    state = mixer.encode_context(context)
    assert torch.allclose(compiled(x, state=state), mixer(x, state=state), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_export(mixer):
    """One program for any batch and lengths."""
    mixer = mixer.float().eval()
    B, T, S = (torch.export.Dim(name, min=2, max=4096) for name in "BTS")
    shapes = {"x": {0: B, 1: T}, "context": {0: B, 1: S}}
    example = {"context": torch.randn(2, 30, E)}
    program = torch.export.export(mixer, (torch.randn(2, 20, D),), example, dynamic_shapes=shapes)
    x, context = torch.randn(3, 7, D), torch.randn(3, 150, E)
    assert torch.allclose(
        program.module()(x, context=context), mixer(x, context=context), atol=1e-5
    )


def test_dropout_is_of_the_output():
    torch.manual_seed(0)
    mixer = nn.TaylorAttention(D, 4, is_causal=False, dropout=0.5)
    x = torch.randn(2, 50, D)
    trained = mixer(x)
    kept = trained != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.allclose(trained[kept], 2 * mixer.eval()(x)[kept], atol=1e-6)


def test_errors(mixer):
    x, context = draw(2, 5, D), draw(2, 7, E)
    with pytest.raises(
        ValueError, match=r"context: expected \[B, S, D\] = \[2, S, 10\], got \[2, 7, 24\]"
    ):
        mixer(x, context=draw(2, 7, D))
    with pytest.raises(
        ValueError, match=r"context: expected \[B, S, D\] = \[2, S, 10\], got \[3, 7, 10\]"
    ):
        mixer(x, context=draw(3, 7, E))
    with pytest.raises(
        ValueError, match=r"context_mask: expected \[B, S\] = \[2, 7\], got \[2, 5\]"
    ):
        mixer(x, context=context, context_mask=torch.ones(2, 5).bool())
    with pytest.raises(
        TypeError, match=r"context_mask: expected a boolean tensor .* try context_mask.bool\(\)"
    ):
        mixer(x, context=context, context_mask=torch.ones(2, 7))
    with pytest.raises(
        TypeError,
        match="context: expected a tensor like x, torch.float64 on cpu, got torch.float32",
    ):
        mixer(x, context=context.float())
    with pytest.raises(
        TypeError, match="context: expected a tensor like x, torch.float64 on cpu, got list"
    ):
        mixer(x, context=[1, 2])
    with pytest.raises(TypeError, match=r"context: expected a tensor \[B, S, D\], got list"):
        mixer.encode_context([1, 2])
    with pytest.raises(ValueError, match=r"context: expected \[B, S, D\] with D=10, got"):
        mixer.encode_context(context[0])
    with pytest.raises(
        ValueError, match="context_mask: given without a context; the mask of x is key_mask"
    ):
        mixer(x, context_mask=torch.ones(2, 5).bool())
    with pytest.raises(ValueError, match=r"key_mask: expected \[B, S\] = \[2, 5\], got \[2, 7\]"):
        mixer(x, context=context, key_mask=torch.ones(2, 7).bool())
    with pytest.raises(
        ValueError, match="context: needed, as keys and values are projected from 10 channels"
    ):
        mixer(x)
    with pytest.raises(
        ValueError, match="return_state: only causal attention carries a state.* pass the context"
    ):
        mixer(x, return_state=True)
    with pytest.raises(ValueError, match="cu_seqlens: packed sequences have no context"):
        mixer(x[:1], context=context[:1], cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="state: expected 1 rows, as x has, got 2"):
        mixer(x[:1], state=mixer.encode_context(context))


@pytest.mark.parametrize("kind", [nn.TaylorAttention, nn.LinearAttention])
def test_what_cannot_cross(kind):
    x, context = torch.randn(2, 5, D), torch.randn(2, 7, D)
    with pytest.raises(
        ValueError, match="context: causal attention is over x itself; build with is_causal=False"
    ):
        kind(D, 4)(x, context=context)
    with pytest.raises(ValueError, match="context: causal attention is over x itself"):
        kind(D, 4)(x, context_mask=torch.ones(2, 5).bool())
    with pytest.raises(ValueError, match="rotary: queries and context have no common positions"):
        kind(D, 4, is_causal=False, rotary=True)(x, context=context)
    with pytest.raises(ValueError, match="rotary: queries and context have no common positions"):
        kind(D, 4, is_causal=False, rotary=True, context_dim=E)
    with pytest.raises(ValueError, match="context_dim: causal attention takes no context"):
        kind(D, 4, context_dim=E)
