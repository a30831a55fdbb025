"""Weights of pytorch-fast-transformers give the numbers of its formulas, and of the package.

The package is compared where it is installed. The stand-ins below have its class and parameter
names, and compute what its documentation says. Mercat's higher order layer is not in the published
package: it is held to its paper's formula.
"""

import math
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

import cumulant as cm
from cumulant import nn
from cumulant.interop import from_fast_transformers

pytestmark = pytest.mark.filterwarnings("ignore")
installed = pytest.mark.skipif(
    find_spec("fast_transformers") is None, reason="needs pytorch-fast-transformers"
)


class Inner(torch.nn.Module):
    """Σ_s φ(q)·φ(k_s) v_s / (Σ_s φ(q)·φ(k_s) + eps) on [N, L, H, E], by the quadratic form."""

    causal = False

    def __init__(self, feature_map=None):
        super().__init__()
        if feature_map is not None:
            self.feature_map = feature_map

    def forward(self, q, k, v, mask):
        phi = getattr(self, "feature_map", lambda x: F.elu(x) + 1)
        weights = torch.einsum("nlhe,nshe->nhls", phi(q), phi(k)) * mask[:, None, None]
        weights = weights.tril() if self.causal else weights
        return torch.einsum("nhls,nshv->nlhv", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)


class LinearAttention(Inner):
    pass


class CausalLinearAttention(Inner):
    causal = True


class LinearSoftmaxAttention(Inner):
    """The higher order layer by its paper: weights x + x²/2, x = LN(q)·LN(k) / (α √E)."""

    alpha = 3

    def forward(self, q, k, v, mask):
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        x = torch.einsum("nlhe,nshe->nhls", q, k) / (self.alpha * math.sqrt(q.shape[-1]))
        weights = (x + x**2 / 2) * mask[:, None, None]
        return torch.einsum("nhls,nshv->nlhv", weights / weights.sum(-1, keepdim=True), v)


class AttentionLayer(torch.nn.Module):
    def __init__(self, inner, dim=32, heads=4, keys=8, values=6):
        super().__init__()
        self.inner_attention, self.n_heads = inner, heads
        self.query_projection = torch.nn.Linear(dim, heads * keys)
        self.key_projection = torch.nn.Linear(dim, heads * keys)
        self.value_projection = torch.nn.Linear(dim, heads * values)
        self.out_projection = torch.nn.Linear(heads * values, dim)

    def forward(self, x, context, mask):
        q, k, v = (
            self.query_projection(x),
            self.key_projection(context),
            self.value_projection(context),
        )
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)) for y in (q, k, v))
        return self.out_projection(self.inner_attention(q, k, v, mask).flatten(2))


def close(actual, expected):
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def everything(n=11):
    return torch.ones(2, n, dtype=torch.bool)


@pytest.mark.parametrize("kind", [LinearAttention, CausalLinearAttention, LinearSoftmaxAttention])
def test_self_attention(kind):
    torch.manual_seed(0)
    original = AttentionLayer(kind()).double()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    mask = torch.arange(11) < torch.tensor([[7], [11]])
    for ours in (
        from_fast_transformers(original),
        from_fast_transformers(
            original.state_dict(),
            heads=4,
            attention={LinearAttention: "linear", CausalLinearAttention: "causal-linear"}.get(
                kind, "linear-softmax"
            ),
        ),
    ):
        close(ours(x), original(x, x, everything()))
        close(ours(x, key_mask=mask)[mask], original(x, x, mask)[mask])


@pytest.mark.parametrize("kind", [LinearAttention, LinearSoftmaxAttention])
def test_cross_attention(kind):
    torch.manual_seed(0)
    original = AttentionLayer(kind()).double()
    ours = from_fast_transformers(original)
    x, context = (
        torch.randn(2, 3, 32, dtype=torch.float64),
        torch.randn(2, 11, 32, dtype=torch.float64),
    )
    mask = torch.rand(2, 11) > 0.3
    close(ours(x, context=context, context_mask=mask), original(x, context, mask))
    close(
        ours(x, state=ours.encode_context(context, context_mask=mask)), original(x, context, mask)
    )


def test_a_recurrence_is_the_causal_layer():
    """The package's state after t tokens, sums S and Z, can be carried on here."""
    torch.manual_seed(0)
    original = AttentionLayer(CausalLinearAttention()).double()
    ours = from_fast_transformers(original)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    k = F.elu(original.key_projection(x[:, :7]).unflatten(-1, (4, 8))) + 1
    v = original.value_projection(x[:, :7]).unflatten(-1, (4, 6))
    S, Z = torch.einsum("nthd,nthm->nhdm", k, v), k.sum(1)
    sums = cm.LinearState(S, Z, torch.tensor([7, 7]))
    y = ours(x[:, 7:], state=nn.KernelAttentionState(sums, None, None))
    close(y, original(x, x, everything())[:, 7:])


class PerHead(torch.nn.Module):
    """A map with weights for each head, on the package's [N, L, H, E]."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8, dtype=torch.float64))

    def forward(self, x):
        return F.softplus(x * self.weight)


def test_feature_maps():
    """Maps take the package's layout and are copied; elu + 1 is recognised by its results."""
    torch.manual_seed(0)
    original = AttentionLayer(CausalLinearAttention(PerHead())).double()
    ours = from_fast_transformers(original)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    expected = original(x, x, everything())
    close(ours(x), expected)
    close(
        ours(x[:, :4]), expected[:, :4]
    )  # as many tokens as heads: no mistaking the one for the other
    original.inner_attention.feature_map.weight.data.zero_()
    close(ours(x), expected)
    plain = AttentionLayer(LinearAttention(lambda x: x.exp())).double()
    close(from_fast_transformers(plain)(x), plain(x, x, everything()))
    elu = AttentionLayer(LinearAttention(lambda x: F.elu(x) + 1))
    assert from_fast_transformers(elu).feature_map == "elu"


def test_feature_maps_of_state_dicts():
    """A map's weights are loaded into the given map; without one they are an error."""
    torch.manual_seed(0)
    learned = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Softplus())
    original = AttentionLayer(CausalLinearAttention(learned)).double()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    fresh = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Softplus()).double()
    known = {"heads": 4, "attention": "causal-linear"}
    ours = from_fast_transformers(original.state_dict(), feature_map=fresh, **known)
    close(ours(x), original(x, x, everything()))
    assert any(p is fresh[0].weight for p in ours.parameters())
    with pytest.raises(
        ValueError,
        match="feature_map: the state dict holds weights of one .0.bias.; give the module",
    ):
        from_fast_transformers(original.state_dict(), **known)


def test_the_published_second_order_is_not_the_quadratic_form():
    """In the package, the output at one query depends on the other queries; here it does not.

    Its code contracts Σ_l q_l q_l with each k_s k_s v_s, and leaves s where the query should
    be.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, n, dtype=torch.float64) for n in (4, 4, 3))

    def second_order_as_published(q):
        return (torch.einsum("ld,le,sd,se->s", q, q, k, k) / 2)[:, None] * v

    x = q @ k.T
    right = (x**2 / 2) @ v
    assert not torch.allclose(second_order_as_published(q), right, atol=0.1)
    changed = q.clone()
    changed[-1] += 1
    assert not torch.allclose(
        second_order_as_published(changed)[0], second_order_as_published(q)[0]
    )
    ours = [
        cm.taylor_attention(
            p[None, None], k[None, None], v[None, None], scale=1.0, constant_term=False
        )[0, 0]
        for p in (q, changed)
    ]
    close(ours[0], ((x + x**2 / 2) / (x + x**2 / 2).sum(-1, keepdim=True)) @ v)
    assert torch.equal(ours[0][:-1], ours[1][:-1])


@installed
@pytest.mark.parametrize("kind", ["LinearAttention", "CausalLinearAttention"])
@pytest.mark.parametrize("random", [False, True], ids=["elu", "random features"])
def test_the_package(kind, random):
    from fast_transformers import attention, feature_maps, masking

    torch.manual_seed(0)
    chosen = feature_maps.Favor.factory(n_dims=16, deterministic_eval=True) if random else None
    original = attention.AttentionLayer(
        getattr(attention, kind)(8, feature_map=chosen), 32, 4, d_keys=8, d_values=6
    )
    causal = kind == "CausalLinearAttention"
    x = torch.randn(2, 11, 32)
    visible = masking.TriangularCausalMask(11) if causal else masking.FullMask(11)
    lengths = masking.LengthMask(torch.tensor([7, 11]), max_len=11)
    if random:
        with pytest.raises(
            ValueError, match="source: its random features were never drawn; call the layer once"
        ):
            from_fast_transformers(original)
    original(x, x, x, visible, lengths, lengths)  # draws the random features
    original.eval()
    ours = from_fast_transformers(original)
    mask = lengths.bool_matrix
    close(ours(x, key_mask=mask)[mask], original(x, x, x, visible, lengths, lengths)[mask])
    if not causal:
        context = torch.randn(2, 11, 32)
        full = masking.FullMask(4, 11)
        expected = original(x[:, :4], context, context, full, None, lengths)
        close(ours(x[:, :4], context=context, context_mask=mask), expected)


@installed
def test_the_package_as_a_recurrence():
    from fast_transformers.masking import LengthMask
    from fast_transformers.recurrent.attention import (
        RecurrentAttentionLayer,
        RecurrentCrossAttentionLayer,
        RecurrentCrossLinearAttention,
        RecurrentLinearAttention,
    )

    torch.manual_seed(0)
    original = RecurrentAttentionLayer(RecurrentLinearAttention(8), 32, 4)
    ours = from_fast_transformers(original)
    x = torch.randn(2, 11, 32)
    theirs = state = None
    for t in range(11):
        with torch.no_grad():
            expected, theirs = original(x[:, t], x[:, t], x[:, t], theirs)
        y, state = ours(x[:, t : t + 1], state=state, return_state=True)
        close(y[:, 0], expected)
    close(state.sums.numerator, theirs[0])
    close(state.sums.denominator, theirs[1])
    cross = RecurrentCrossAttentionLayer(RecurrentCrossLinearAttention(8), 32, 4)
    expected, _ = cross(x[:, 0], x, x, LengthMask(torch.tensor([7, 11]), max_len=11))
    ours = from_fast_transformers(cross)
    mask = torch.arange(11) < torch.tensor([[7], [11]])
    close(ours(x[:, :1], context=x, context_mask=mask)[:, 0], expected)


def test_errors():
    original = AttentionLayer(LinearAttention())
    for option in ({"heads": 4}, {"alpha": 2.0}, {"feature_map": "elu"}):
        with pytest.raises(
            ValueError, match="heads, attention, feature_map, alpha: read off the layer"
        ):
            from_fast_transformers(original, **option)
    known = {"heads": 4, "attention": "linear-softmax"}
    with pytest.raises(ValueError, match="alpha: expected a positive number, got 0"):
        from_fast_transformers(original.state_dict(), alpha=0, **known)
    with pytest.raises(
        ValueError, match="feature_map: attention 'linear-softmax' has none; leave it out"
    ):
        from_fast_transformers(original.state_dict(), feature_map="elu", **known)
    with pytest.raises(ValueError, match="alpha: attention 'linear' has none; leave it out"):
        from_fast_transformers(original.state_dict(), heads=4, attention="linear", alpha=2)
    original.inner_attention.eps = 0.01
    with pytest.raises(
        ValueError, match="source: its epsilon of 0.01 in denominators shapes its outputs"
    ):
        from_fast_transformers(original)
    with pytest.raises(ValueError, match="heads: the weights do not tell the number of heads"):
        from_fast_transformers(original.state_dict(), attention="linear")
    with pytest.raises(ValueError, match="heads: 5 must divide the 32 query and 24 value channels"):
        from_fast_transformers(original.state_dict(), heads=5, attention="linear")
    with pytest.raises(
        ValueError,
        match="attention: expected one of linear, causal-linear, linear-softmax, got 'full'",
    ):
        from_fast_transformers(original.state_dict(), heads=4, attention="full")
    with pytest.raises(ValueError, match="source: 'query_projection.weight' is missing"):
        from_fast_transformers({}, heads=4, attention="linear")
    with pytest.raises(ValueError, match="source: 'norm1.weight' has no place in LinearAttention"):
        from_fast_transformers(
            {**original.state_dict(), "norm1.weight": torch.ones(32)}, heads=4, attention="linear"
        )
    with pytest.raises(
        TypeError,
        match="source: expected a layer of pytorch-fast-transformers around one of .* of ReLU",
    ):
        from_fast_transformers(AttentionLayer(torch.nn.ReLU()))
    with pytest.raises(TypeError, match="around one of .*, got Linear"):
        from_fast_transformers(torch.nn.Linear(2, 2))
