"""`TaylorAttention` with the weights of taylor-series-linear-attention gives its numbers.

Its causal form needs a compiled package, so that is held to its formula: its own feature expansion and cumulative sums,
as its code has them. What differs by design: it clamps denominators at 1e-5, ours need no clamp (they are at least ½).
"""

import pytest
import torch

from cumulant import nn

package = pytest.importorskip("taylor_series_linear_attention.attention")


def pair(**options):
    torch.manual_seed(0)
    theirs = package.TaylorSeriesLinearAttn(dim=32, dim_head=8, heads=4, **options).double()
    ours = nn.TaylorAttention(
        32,
        4,
        head_dim=8,
        value_dim=8,
        num_kv_heads=1 if options.get("one_headed_kv") else None,
        is_causal=False,
        rotary=options.get("rotary_emb", False),
        gate_values=options.get("gate_value_heads", False),
    ).double()
    key, value = theirs.to_kv[0].weight.chunk(2)
    weights = {
        "q_proj.weight": theirs.to_q[0].weight,
        "k_proj.weight": key,
        "v_proj.weight": value,
        "out_proj.weight": theirs.to_out[0].weight,
    }
    if theirs.to_v_gates is not None:
        weights["gate_proj.weight"] = theirs.to_v_gates[0].weight
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary_emb": True},
        {"gate_value_heads": True},
        {"one_headed_kv": True},
        {"rotary_emb": True, "gate_value_heads": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_bidirectional(options, symmetric, masked):
    if masked and options.get("rotary_emb"):
        pytest.skip("it counts padding as positions; ours does not")
    theirs, ours = pair(remove_even_power_dups=symmetric, **options)
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    mask = torch.rand(2, 13) > 0.3 if masked else None
    expected, out = theirs(x, mask=mask), ours(x, key_mask=mask)
    kept = slice(None) if mask is None else mask
    # rotary angles: fp32 in the package
    assert torch.allclose(out[kept], expected[kept], atol=1e-6 if options.get("rotary_emb") else 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gates", [False, True])
def test_causal_by_its_formula(gates):
    theirs, ours = pair(gate_value_heads=gates)
    ours.is_causal = True
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    q, (k, v) = theirs.to_q(x) * theirs.scale, theirs.to_kv(x)
    q, k = theirs.taylor_expand_fn(q), theirs.taylor_expand_fn(k)
    numerator = torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))
    denominator = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    out = numerator / denominator.clamp(min=1e-5)[..., None]
    if gates:
        out = out * theirs.to_v_gates(x)
    expected = theirs.to_out(theirs.merge_heads(out))
    assert torch.allclose(ours(x), expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_features_have_its_inner_products():
    """136 symmetric features of degree 2 in place of its 256, the same inner product."""
    from cumulant.kernels.reference import taylor_features

    q, k = torch.randn(2, 5, 16, dtype=torch.float64)
    theirs = package.second_taylor_expansion(q) @ package.second_taylor_expansion(k).T
    ours = taylor_features(2, True)
    assert ours(q).shape[-1] == 153
    assert torch.allclose(ours(q) @ ours(k).T, theirs)
