"""Weights of taylor-series-linear-attention give the same numbers for all its options.

Its causal form multiplies through a compiled package. Where that is not installed, the one product
it takes from there stands in as its formula, so that its own code runs, cache included.
"""

import copy
import itertools
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from cumulant import nn
from cumulant.interop import from_taylor_series
from cumulant.models import TaylorViT

package = pytest.importorskip("taylor_series_linear_attention")
pytestmark = pytest.mark.filterwarnings("ignore")
FLAGS = (
    "one_headed_kv",
    "rotary_emb",
    "gate_value_heads",
    "prenorm",
    "shift_tokens",
    "combine_heads",
)
COMBINATIONS = [
    dict(zip(FLAGS, values)) for values in itertools.product((False, True), repeat=len(FLAGS))
]


def describe(options):
    return "+".join(name for name, value in options.items() if value) or "plain"


by_options = pytest.mark.parametrize("options", COMBINATIONS, ids=describe)


@pytest.fixture
def causal_product(monkeypatch):
    """The real package, or its one function that is used here: out_t = Σ_{s≤t} (q_t·k_s) v_s."""
    if find_spec("fast_transformers") is not None:
        return
    root, module = ModuleType("fast_transformers"), ModuleType("fast_transformers.causal_product")
    root.__spec__ = ModuleSpec("fast_transformers", None)

    class CausalDotProduct:
        @staticmethod
        def apply(q, k, v):
            return torch.einsum(
                "bhtf,bhtfv->bhtv", q, torch.einsum("bhtf,bhtv->bhtfv", k, v).cumsum(2)
            )

    module.CausalDotProduct = CausalDotProduct
    monkeypatch.setitem(sys.modules, "fast_transformers", root)
    monkeypatch.setitem(sys.modules, "fast_transformers.causal_product", module)


def theirs(**options):
    torch.manual_seed(0)
    module = package.TaylorSeriesLinearAttn(dim=32, dim_head=8, heads=4, **options)
    for name, p in module.named_parameters():
        if name == "norm.gamma":
            p.data.uniform_(0.5, 1.5)
    return module.eval()


def close(actual, expected):
    assert actual.dtype == torch.float32
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


@by_options
@pytest.mark.parametrize("symmetric", [False, True], ids=["full", "symmetric"])
def test_self_attention(options, symmetric):
    original = theirs(remove_even_power_dups=symmetric, **options)
    ours = from_taylor_series(original)
    x = torch.randn(2, 13, 32)
    close(ours(x), original(x))
    mask = torch.rand(2, 13) > 0.3
    if (
        options["rotary_emb"] or options["shift_tokens"]
    ):  # only padding at the end leaves their neighbours in place
        mask = torch.arange(13) < torch.tensor([[9], [13]])
    close(ours(x, key_mask=mask)[mask], original(x, mask=mask)[mask])


@pytest.mark.parametrize("options", [o for o in COMBINATIONS if not o["rotary_emb"]], ids=describe)
def test_cross_attention(options):
    original = theirs(**options)
    ours = from_taylor_series(original)
    x, context, mask = torch.randn(2, 5, 32), torch.randn(2, 40, 32), torch.rand(2, 40) > 0.3
    mask[0] = False  # nothing to see: zeros
    close(ours(x, context=context), original(x, context=context))
    expected = original(x, context=context, mask=mask)
    close(ours(x, context=context, context_mask=mask), expected)
    close(ours(x, state=ours.encode_context(context, context_mask=mask)), expected)


@by_options
def test_causal_and_cached(causal_product, options):
    """The package's cache goes on token by token; ours takes any number of tokens."""
    original = theirs(causal=True, **options)
    ours = from_taylor_series(original)
    assert ours.is_causal
    x = torch.randn(2, 13, 32)
    close(ours(x), original(x))
    expected, cache = original(x[:, :9], return_cache=True)
    y, state = ours(x[:, :9], return_state=True)
    close(y, expected)
    steps = []
    for t in range(9, 13):
        y, cache = original(x[:, t : t + 1], cache=cache, return_cache=True)
        steps.append(y)
    close(ours(x[:, 9:], state=state, return_state=True)[0], torch.cat(steps, 1))


def test_what_it_refuses_and_ours_does(causal_product):
    """A mask with causal attention, and several tokens onto a cache."""
    original = theirs(causal=True, shift_tokens=True)
    ours = from_taylor_series(original)
    x = torch.randn(2, 13, 32)
    mask = torch.arange(13) >= torch.tensor([[4], [0]])  # left padding
    with pytest.raises(AssertionError, match="masking does not make sense"):
        original(x, mask=mask)
    close(ours(x, key_mask=mask)[0, 4:], original(x[:1, 4:])[0])
    _, cache = original(x[:, :9], return_cache=True)
    with pytest.raises(AssertionError):
        original(x[:, 9:], cache=cache)
    _, state = ours(x[:, :9], return_state=True)
    close(ours(x[:, 9:], state=state), original(x)[:, 9:])


def test_padding_in_front_is_no_token_for_ours():
    """The package counts padding in rotations and shifts; ours gives the bare sequence's output."""
    original = theirs(rotary_emb=True, shift_tokens=True)
    ours = from_taylor_series(original)
    x = torch.randn(1, 13, 32)
    mask = torch.arange(13)[None] >= 4
    bare = original(x[:, 4:])
    close(ours(x, key_mask=mask)[:, 4:], bare)
    assert not torch.allclose(original(x, mask=mask)[:, 4:], bare, atol=1e-3)


@pytest.mark.parametrize("options", COMBINATIONS[::7], ids=describe)
def test_state_dicts(options):
    original = theirs(**options)
    x = torch.randn(2, 13, 32)
    heads = (
        None if options["gate_value_heads"] or options["one_headed_kv"] else 4
    )  # some weights tell
    known = {"heads": heads, "shift_tokens": options["shift_tokens"]}
    close(from_taylor_series(original.state_dict(), causal=False, **known)(x), original(x))
    causal = from_taylor_series(original.state_dict(), causal=True, **known)
    close(causal(x)[:, :5], causal(x[:, :5]))


def test_gradients_are_the_same():
    original = theirs(gate_value_heads=True, prenorm=True)
    ours = from_taylor_series(original)
    x = torch.randn(2, 13, 32)
    for module in (original, ours):
        module(x).square().sum().backward()
    close(ours.q_proj.weight.grad, original.to_q[0].weight.grad)
    close(
        torch.cat((ours.k_proj.weight.grad, ours.v_proj.weight.grad)), original.to_kv[0].weight.grad
    )
    close(ours.norm.weight.grad, original.norm.gamma.grad)


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (2, 16, 3, 4, 5)], ids=["images", "video"])
def test_channel_first(shape):
    torch.manual_seed(0)
    original = package.ChannelFirstTaylorSeriesLinearAttn(
        dim=16, dim_head=8, heads=2, rotary_emb=True
    ).eval()
    ours = from_taylor_series(original)
    assert isinstance(ours, nn.ChannelFirst)
    x = torch.randn(shape)
    close(ours(x), original(x))
    again = from_taylor_series(original.state_dict(), heads=2, causal=False, shift_tokens=False)
    close(again(x), original(x))


def test_vit():
    torch.manual_seed(0)
    original = package.vit.ViT(
        image_size=24, patch_size=4, num_classes=7, dim=32, depth=2, heads=4, dropout=0.1
    )
    ours = from_taylor_series(original.eval())
    assert isinstance(ours, TaylorViT)
    assert ours.layers[0].attention.dropout.p == 0.1
    images = torch.randn(2, 3, 24, 24)
    close(ours(images), original(images))
    close(
        from_taylor_series(original.state_dict(), heads=4, patch_size=4)(images), original(images)
    )
    odd = package.vit.ViT(
        image_size=8, patch_size=4, num_classes=7, dim=28, depth=1, heads=4, ff_mult=61 / 28 + 1e-9
    )
    close(from_taylor_series(odd.eval())(images[..., :8, :8]), odd(images[..., :8, :8]))
    odd.transformer.layers.append(copy.deepcopy(odd.transformer.layers[0]))
    odd.transformer.layers[1][1] = package.TaylorSeriesLinearAttn(28, dim_head=4, heads=8)
    with pytest.raises(ValueError, match="source: the layers of the ViT differ"):
        from_taylor_series(odd)


def test_dropout_dtype_and_mode_come_along():
    original = theirs(dropout=0.25).bfloat16().train()
    ours = from_taylor_series(original)
    assert ours.dropout.p == 0.25
    assert ours.training
    assert ours.q_proj.weight.dtype == torch.bfloat16
    original.to_q[0].weight.data.zero_()
    assert ours.q_proj.weight.any()  # a copy
    mixed = theirs(prenorm=True).bfloat16()
    mixed.norm.float()
    ours = from_taylor_series(mixed)
    assert ours.norm.weight.dtype == torch.float32
    assert ours.q_proj.weight.dtype == torch.bfloat16
    assert all(p.requires_grad for p in ours.parameters())


def test_errors():
    original = theirs()
    with pytest.raises(
        ValueError, match="heads: read off the module; give it only with a state dict"
    ):
        from_taylor_series(original, heads=4)
    known = {"causal": False, "shift_tokens": False}
    for missing in known:
        with pytest.raises(
            ValueError, match=f"{missing}: the weights do not tell it; give {missing}=True or False"
        ):
            from_taylor_series(original.state_dict(), heads=4, **{**known, missing: None})
    with pytest.raises(ValueError, match="heads: the weights do not tell the number of heads"):
        from_taylor_series(original.state_dict(), **known)
    with pytest.raises(
        ValueError, match="heads: 5 do not fit the 32 channels of queries and 32 of keys"
    ):
        from_taylor_series(original.state_dict(), heads=5, **known)
    with pytest.raises(
        ValueError, match="heads: 1 do not fit the 32 channels of queries and 8 of keys"
    ):
        from_taylor_series(theirs(one_headed_kv=True).state_dict(), heads=1, **known)
    block = torch.nn.Module()
    block.attn = original
    with pytest.raises(
        TypeError, match="source: expected a module of taylor-series-linear-attention, got Module"
    ):
        from_taylor_series(block)
    with pytest.raises(ValueError, match=r"source: 'to_q.0.weight' is missing, .* found weight"):
        from_taylor_series({"weight": torch.zeros(2)}, heads=1, **known)
    with pytest.raises(ValueError, match="source: 'extra' has no place in TaylorAttention"):
        from_taylor_series({**original.state_dict(), "extra": torch.zeros(2)}, heads=4, **known)
    with pytest.raises(
        ValueError,
        match=r"source: the weight for out_proj.weight has shape \[3, 3\], expected \[32, 32\]",
    ):
        from_taylor_series(
            {**original.state_dict(), "to_out.0.weight": torch.zeros(3, 3)}, heads=4, **known
        )
    with pytest.raises(
        TypeError, match="source: expected a module of taylor-series-linear-attention, got Linear"
    ):
        from_taylor_series(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="or its state dict, got str"):
        from_taylor_series("weights.pt")
    rotary = theirs(rotary_emb=True).state_dict()
    rotary["rotary_emb.freqs"] = rotary["rotary_emb.freqs"] * 2
    with pytest.raises(
        ValueError, match="source: its rotary frequencies are not those of base 10,000"
    ):
        from_taylor_series(rotary, heads=4, **known)
    vit = package.vit.ViT(
        image_size=8, patch_size=4, num_classes=7, dim=32, depth=1, heads=4
    ).state_dict()
    with pytest.raises(ValueError, match="patch_size: the weights do not tell it"):
        from_taylor_series(vit, heads=4)
    with pytest.raises(ValueError, match="patch_size: 5 x 5 must divide the 48 numbers of a patch"):
        from_taylor_series(vit, heads=4, patch_size=5)
