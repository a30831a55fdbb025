"""Options of mixers: drawn at random, against their formulas, and those that are refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cumulant import nn
from cumulant.nn.decay import DECAYS

from .common import D, forgetful


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["taylor", "linear"])
def test_any_options_masks_and_splits(kind, data):
    """Drawn options, masks and splits give the outputs of each row alone, unpadded and whole."""
    B, G, R, K, V = (data.draw(st.integers(1, 3)) for _ in range(5))
    T = data.draw(st.integers(0, 20))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    options = {"num_kv_heads": G, "value_dim": V, "conv_size": data.draw(st.integers(0, 3))}
    flags = ("rotary", "prenorm", "qk_norm", "gate_values", "combine_heads", "shift_tokens", "bias")
    options |= {name: data.draw(st.booleans(), label=name) for name in flags}
    options["decay"] = data.draw(st.sampled_from(DECAYS))
    options["head_dim"] = 2 * K if options["rotary"] else K
    if kind == "taylor":
        mixer = nn.TaylorAttention(
            D, G * R, order=data.draw(st.sampled_from([2, 4])), **options
        ).double()
    else:
        feature_map = data.draw(st.sampled_from(["elu", "relu", "softmax", "hedgehog", "rebased"]))
        if feature_map == "softmax":
            options["decay"] = "none"
        mixer = nn.LinearAttention(D, G * R, feature_map=feature_map, **options).double()
    if options["decay"] in ("gated", "mamba2"):
        forgetful(mixer)
    x = torch.randn(B, T, D, dtype=torch.float64)
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T)), dtype=torch.bool
    )
    mask = mask.view(B, T)
    state, outs, at = None, [], 0
    for end in [*sorted(data.draw(st.lists(st.integers(0, T), max_size=3))), T]:
        y, state = mixer(x[:, at:end], key_mask=mask[:, at:end], state=state, return_state=True)
        outs.append(y)
        at = end
    y = torch.cat(outs, 1)
    assert not y[~mask].any()
    for b in range(B):
        alone = mixer(x[b][mask[b]][None])[0]
        assert torch.allclose(y[b][mask[b]], alone, rtol=1e-7, atol=1e-8)
    both = mixer_in_both_directions(mixer)
    y = both(x, key_mask=mask) if both else y
    for b in range(B if both else 0):
        alone = both(x[b][mask[b]][None])[0]
        assert torch.allclose(y[b][mask[b]], alone, rtol=1e-7, atol=1e-8)


def mixer_in_both_directions(mixer):
    """The same mixer, seeing later tokens too, or None where a convolution or decay forbids it."""
    if mixer.conv is not None or mixer.decay is not None:
        return None
    mixer.is_causal = False
    return mixer


@pytest.mark.parametrize("order", [1, 3, 6])
def test_any_order_by_the_reference(order):
    """A module whose order only the reference takes, against the polynomial of the scores."""
    torch.manual_seed(0)
    mixer = nn.TaylorAttention(D, 2, head_dim=3, order=order, impl="reference").double()
    x = 0.1 * torch.randn(1, 9, D, dtype=torch.float64)
    q, k = (p(x).unflatten(-1, (2, 3)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj))
    v = mixer.v_proj(x).unflatten(-1, (2, 12)).transpose(1, 2)
    scores = q @ k.mT / 3**0.5
    weights = sum(scores**p / math.factorial(p) for p in range(order + 1)).tril()
    out = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(mixer(x), mixer.out_proj(out), atol=1e-12)


def test_mercats_layer_is_its_formula():
    """LayerNorm of q and k, scores over alpha sqrt(K), no constant term."""
    torch.manual_seed(0)
    mixer = nn.TaylorAttention(
        D, 2, head_dim=5, qk_norm=True, constant_term=False, bias=True
    ).double()
    x = torch.randn(1, 9, D, dtype=torch.float64)
    q, k = (p(x).unflatten(-1, (2, 5)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj))
    q, k = (
        (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        for y in (q, k)
    )
    scores = q @ k.mT / (3 * 5**0.5)
    weights = (scores + scores**2 / 2).tril()
    out = (
        weights
        / weights.sum(-1, keepdim=True)
        @ mixer.v_proj(x).unflatten(-1, (2, 12)).transpose(1, 2)
    )
    assert torch.allclose(mixer(x), mixer.out_proj(out.transpose(1, 2).flatten(2)), atol=1e-10)


def test_construction_errors():
    with pytest.raises(
        ValueError, match="num_kv_heads: the 3 key/value heads must divide the 4 query heads"
    ):
        nn.TaylorAttention(D, 4, num_kv_heads=3)
    with pytest.raises(
        ValueError, match="num_kv_heads: the 3 key/value heads must divide the 4 query heads"
    ):
        nn.SoftmaxAttention(D, 4, num_kv_heads=3)
    with pytest.raises(
        ValueError, match="num_heads: 5 must divide dim=24, or value_dim must be given"
    ):
        nn.TaylorAttention(D, 5)
    with pytest.raises(
        ValueError, match="num_heads: 5 must divide dim=24, or head_dim must be given"
    ):
        nn.SoftmaxAttention(D, 5)
    with pytest.raises(ValueError, match="order: expected an integer of at least 1, got 0"):
        nn.TaylorAttention(D, 4, order=0)
    with pytest.raises(ValueError, match="feature_map: expected one of"):
        nn.LinearAttention(D, 4, feature_map="gelu")
    with pytest.raises(
        ValueError, match="dim: rotary embedding needs an even number of dimensions, got 5"
    ):
        nn.TaylorAttention(D, 4, head_dim=5, rotary=True)
    with pytest.raises(
        ValueError,
        match="conv_size: the short convolution looks backwards only; it needs is_causal",
    ):
        nn.LinearAttention(D, 4, is_causal=False, conv_size=3)
    for bad in (0, -1.5, math.nan):
        with pytest.raises(ValueError, match=f"alpha: expected a positive number, got {bad}"):
            nn.TaylorAttention(D, 4, qk_norm=True, alpha=bad)
    with pytest.raises(ValueError, match="alpha: given beside scale; leave one out"):
        nn.TaylorAttention(D, 4, alpha=2, scale=0.5)
    with pytest.raises(ValueError, match="head_dim: expected at least 1, got 0"):
        nn.TaylorAttention(D, 4, head_dim=0)
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        nn.LinearAttention(D, 0)
    with pytest.raises(ValueError, match="dropout: expected a probability below 1, got 1"):
        nn.TaylorAttention(D, 4, dropout=1.0)
    with pytest.raises(
        TypeError, match="feature_map: expected a pair of callables, for queries and for keys"
    ):
        nn.LinearAttention(D, 4, feature_map=(torch.exp, "elu"))
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        nn.SlidingWindowAttention(D, 4, window=0)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        nn.GatedShortConvolution(D, size=0)
