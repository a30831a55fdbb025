"""FLASH-pytorch's modules and ours give the same numbers with the same weights."""

import itertools

import pytest
import torch

from cumulant import nn
from cumulant.interop import from_flash_pytorch
from cumulant.models import CumulantForCausalLM, CumulantForMaskedLM

flash_pytorch = pytest.importorskip("flash_pytorch")
package = pytest.importorskip("flash_pytorch.flash_pytorch")
D, G = 24, 8
LENGTHS = [1, 5, 8, 16, 37, 48]  # multiples of the group and others


def perturbed(module):
    """Weights away from where they start, so that every part shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "freqs" in name:
                continue
            if "gamma" in name:
                p.normal_(std=1.5)
            elif "relative_attention_bias" in name:
                p.normal_(std=0.2)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return module.eval()


def compare(theirs, ours, x, atol=1e-5, **masks):
    """fp32 outputs to 1e-5 of their size, gradients of the input too."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(a, **masks)
    actual = ours(b, **({"key_mask": masks["mask"]} if masks else {}))
    kept = masks.get("mask", torch.ones(x.shape[:2], dtype=torch.bool))
    expected, actual = expected[kept], actual[kept]
    scale = float(expected.detach().abs().max().clamp(min=1))
    assert float((actual - expected).detach().abs().max()) < atol * scale
    weight = torch.randn_like(expected)
    (p,) = torch.autograd.grad((expected * weight).sum(), a)
    (q,) = torch.autograd.grad((actual * weight).sum(), b)
    assert float((p - q).abs().max() / p.abs().max().clamp(min=1)) < 10 * atol


@pytest.mark.parametrize(
    ("causal", "laplace", "residual", "norm"),
    list(
        itertools.product([True, False], [True, False], [True, False], ["LayerNorm", "ScaleNorm"])
    ),
)
def test_gau(causal, laplace, residual, norm):
    kind = torch.nn.LayerNorm if norm == "LayerNorm" else package.ScaleNorm
    options = {
        "causal": causal,
        "laplace_attn_fn": laplace,
        "add_residual": residual,
        "norm_klass": kind,
    }
    theirs = perturbed(flash_pytorch.GAU(dim=D, query_key_dim=6, expansion_factor=1.5, **options))
    for T in LENGTHS:
        ours = from_flash_pytorch(theirs, **({"length_scale": T} if causal else {}))
        assert isinstance(ours, nn.GatedAttentionUnit)
        compare(theirs, ours, torch.randn(2, T, D))
    state = {name: x.clone() for name, x in theirs.state_dict().items()}
    again = from_flash_pytorch(
        state,
        causal=causal,
        laplace_attn_fn=laplace,
        add_residual=residual,
        **({"length_scale": 48} if causal else {}),
    ).eval()
    compare(theirs, again, torch.randn(2, 48, D))


def test_gau_takes_a_bias():
    theirs = perturbed(flash_pytorch.GAU(dim=D, query_key_dim=6, causal=True))
    ours = from_flash_pytorch(theirs, length_scale=20)
    x, bias = torch.randn(2, 20, D), 3 * torch.randn(20, 20)
    assert torch.allclose(ours(x, bias=bias), theirs(x, rel_pos_bias=bias), atol=1e-5)
    assert not torch.allclose(ours(x), theirs(x, rel_pos_bias=bias), atol=1e-3)


def test_the_package_ignores_the_flag_of_its_bias():
    """With rel_pos_bias=False the package still adds the bias, and so does the converted unit."""
    theirs = perturbed(flash_pytorch.GAU(dim=D, query_key_dim=6, rel_pos_bias=False))
    x = torch.randn(2, 20, D)
    ours = from_flash_pytorch(theirs)
    assert ours.relative_bias is not None
    compare(theirs, ours, x)
    assert nn.GatedAttentionUnit(D, relative_bias=False).relative_bias is None


@pytest.mark.parametrize(
    ("causal", "laplace", "shift", "reduce", "rotary", "norm"),
    list(
        itertools.product(
            [True, False],
            [True, False],
            [True, False],
            [True, False],
            [0, 4, 6],
            ["LayerNorm", "ScaleNorm"],
        )
    ),
)
def test_flash(causal, laplace, shift, reduce, rotary, norm):
    theirs = perturbed(
        flash_pytorch.FLASH(
            dim=D,
            group_size=G,
            query_key_dim=6,
            expansion_factor=1.5,
            causal=causal,
            rotary_pos_emb=package.RotaryEmbedding(dim=rotary) if rotary else None,
            norm_klass=torch.nn.LayerNorm if norm == "LayerNorm" else package.ScaleNorm,
            shift_tokens=shift,
            laplace_attn_fn=laplace,
            reduce_group_non_causal_attn=reduce,
        )
    )
    ours = from_flash_pytorch(theirs)
    assert isinstance(ours, nn.MixedChunkAttention)
    options = {
        "laplace_attn_fn": laplace,
        "shift_tokens": shift,
        "reduce_group_non_causal_attn": reduce,
    }
    again = from_flash_pytorch(theirs.state_dict(), causal=causal, group_size=G, **options).eval()
    for T in LENGTHS:
        x = torch.randn(2, T, D)
        compare(theirs, ours, x)
        assert torch.equal(again(x), ours(x))


def test_flash_at_its_usual_size():
    theirs = perturbed(flash_pytorch.FLASH(dim=64, causal=True))
    compare(theirs, from_flash_pytorch(theirs), torch.randn(1, 700, 64))


@pytest.mark.parametrize(
    ("causal", "norm", "shift", "laplace", "reduce"),
    list(
        itertools.product(
            [True, False], ["scalenorm", "layernorm"], [True, False], [True, False], [True, False]
        )
    ),
)
def test_transformer(causal, norm, shift, laplace, reduce):
    theirs = perturbed(
        flash_pytorch.FLASHTransformer(
            num_tokens=50,
            dim=D,
            depth=3,
            group_size=G,
            query_key_dim=40,
            causal=causal,
            norm_type=norm,
            shift_tokens=shift,
            laplace_attn_fn=laplace,
            reduce_group_non_causal_attn=reduce,
        )
    )
    ours = from_flash_pytorch(theirs)
    assert type(ours) is (CumulantForCausalLM if causal else CumulantForMaskedLM)
    for T in LENGTHS:
        ids = torch.randint(50, (2, T))
        expected = theirs(ids).detach()
        assert (
            float((ours(ids).logits.detach() - expected).abs().max() / expected.abs().max()) < 1e-5
        )
    options = {
        "laplace_attn_fn": laplace,
        "shift_tokens": shift,
        "reduce_group_non_causal_attn": reduce,
    }
    again = from_flash_pytorch(theirs.state_dict(), causal=causal, group_size=G, **options).eval()
    assert torch.equal(again(ids).logits, ours(ids).logits)
    if causal:
        generated = ours.generate(ids[:1, :9], max_new_tokens=20, do_sample=False, pad_token_id=0)
        rerun = ids[:1, :9]
        for _ in range(20):  # the package's own way: the whole sequence for every token
            rerun = torch.cat((rerun, theirs(rerun)[:, -1:].argmax(-1)), 1)
        assert torch.equal(generated, rerun)


# ---- where the package's behaviour is not ours ----

MASKS = {
    "left": [0] * 11 + [1] * 26,
    "right": [1] * 20 + [0] * 17,
    "holes": [1, 0, 1, 1, 0] * 7 + [1, 1],
}


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("causal", [True, False])
def test_masked_tokens_in_the_package(causal, where):
    """Masked tokens count in the package, and with compatible=True; otherwise they do not exist.

    In the package they take positions in groups, and count in the divisor.
    """
    mask = torch.tensor([MASKS[where], [1] * 37]).bool()
    rotary = package.RotaryEmbedding(dim=4)
    theirs = perturbed(
        flash_pytorch.FLASH(
            dim=D,
            group_size=G,
            query_key_dim=6,
            causal=causal,
            shift_tokens=True,
            rotary_pos_emb=rotary,
        )
    )
    x = torch.randn(2, 37, D)
    compare(theirs, from_flash_pytorch(theirs, compatible=True), x, mask=mask)
    ours, alone = from_flash_pytorch(theirs), x[:1, mask[0]]
    y = ours(x, key_mask=mask)
    assert torch.allclose(y[0, mask[0]], ours(alone)[0], atol=1e-5)
    assert torch.allclose(
        y[0, mask[0]], theirs(alone)[0], atol=1e-4
    )  # unpadded, the package agrees
    moved = torch.allclose(theirs(x, mask=mask)[0, mask[0]], theirs(alone)[0], atol=1e-3)
    assert moved == (
        causal and where == "right"
    )  # padded, it agrees only where nothing is moved or divided


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("causal", [True, False])
def test_masked_tokens_in_the_packages_gau(causal, where):
    mask = torch.tensor([MASKS[where], [1] * 37]).bool()
    theirs = perturbed(flash_pytorch.GAU(dim=D, query_key_dim=6, causal=causal))
    x = torch.randn(2, 37, D)
    compare(theirs, from_flash_pytorch(theirs, compatible=True), x, mask=mask)
    ours = from_flash_pytorch(theirs, **({"length_scale": 37} if causal else {}))
    y = ours(x, key_mask=mask)
    assert torch.allclose(y[0, mask[0]], ours(x[:1, mask[0]])[0], atol=1e-5)
    assert not torch.allclose(
        theirs(x, mask=mask)[0, mask[0]], theirs(x[:1, mask[0]])[0], atol=1e-3
    )


def test_masked_tokens_in_the_packages_transformer():
    """Absolute positions count padding too."""
    theirs = perturbed(
        flash_pytorch.FLASHTransformer(num_tokens=50, dim=D, depth=2, group_size=G, query_key_dim=6)
    )
    ids, mask = torch.randint(50, (2, 37)), torch.tensor([MASKS["left"], [1] * 37]).bool()
    same = from_flash_pytorch(theirs, compatible=True)(ids, attention_mask=mask).logits.detach()
    expected = theirs(ids, mask=mask).detach()
    assert float((same - expected)[mask].abs().max() / expected.abs().max()) < 1e-5
    ours = from_flash_pytorch(theirs)
    alone = ours(ids[:1, mask[0]]).logits[0]
    assert torch.allclose(ours(ids, attention_mask=mask).logits[0, mask[0]], alone, atol=1e-5)


def test_causal_gau_divides_by_the_whole_length_in_the_package():
    """Later tokens change its outputs, so ours refuses to carry a state with such a divisor."""
    theirs = perturbed(flash_pytorch.GAU(dim=D, query_key_dim=6, causal=True))
    x = torch.randn(1, 20, D)
    assert not torch.allclose(theirs(x)[:, :10], theirs(x[:, :10]), atol=1e-3)
    with pytest.raises(
        ValueError,
        match=r"length_scale: a causal GAU of this package divides by the length of its input",
    ):
        from_flash_pytorch(theirs)
    same = from_flash_pytorch(theirs, compatible=True)
    for T in (10, 20):
        compare(theirs, same, x[:, :T])
    with pytest.raises(
        ValueError,
        match=r"state: length_scale='total' divides .* build with length_scale=<the length",
    ):
        same(x, return_state=True)
    ours = from_flash_pytorch(theirs, length_scale=20)
    first, state = ours(x[:, :13], return_state=True)
    rest = ours(x[:, 13:], state=state)
    assert torch.allclose(torch.cat((first, rest), 1), theirs(x), atol=1e-5)


def test_training_mode_and_dropout_carry_over():
    theirs = flash_pytorch.FLASH(dim=D, group_size=G, query_key_dim=6, dropout=0.3)
    ours = from_flash_pytorch(theirs)
    assert ours.training
    assert ours.dropout == 0.3
    unit = from_flash_pytorch(flash_pytorch.GAU(dim=D, query_key_dim=6, dropout=0.3).eval())
    assert not unit.training
    assert unit.dropout == unit.out_dropout.p == 0.3
    x = torch.randn(1, 9, D)
    assert torch.equal(unit(x), unit(x))
    assert not torch.allclose(unit.train()(x), unit(x))


def test_low_precision_and_other_norms_carry_over():
    theirs = perturbed(
        flash_pytorch.FLASHTransformer(num_tokens=50, dim=64, depth=1, group_size=G)
    ).bfloat16()
    ours, ids = from_flash_pytorch(theirs), torch.randint(50, (1, 20))
    assert ours.dtype == torch.bfloat16
    expected = theirs(ids).detach().float()
    assert float((ours(ids).logits.detach().float() - expected).norm() / expected.norm()) < 0.05
    theirs = perturbed(
        flash_pytorch.FLASH(dim=D, group_size=G, query_key_dim=6, norm_klass=torch.nn.RMSNorm)
    )
    compare(theirs, from_flash_pytorch(theirs), 1e-3 * torch.randn(2, 20, D))


def test_errors():
    layer = flash_pytorch.FLASH(dim=D, group_size=G, query_key_dim=6)
    with pytest.raises(
        ValueError, match="causal: read off the module; give it only with a state dict"
    ):
        from_flash_pytorch(layer, causal=True)
    with pytest.raises(ValueError, match=r"causal: the weights do not tell it; give causal=\.\.\."):
        from_flash_pytorch(layer.state_dict())
    with pytest.raises(
        ValueError, match=r"group_size: the weights do not tell it; give group_size=\.\.\."
    ):
        from_flash_pytorch(layer.state_dict(), causal=True)
    with pytest.raises(
        ValueError, match="length_scale: only for a causal GAU, and not with compatible=True"
    ):
        from_flash_pytorch(layer, length_scale=5)
    with pytest.raises(
        TypeError,
        match="source: expected a GAU, FLASH or FLASHTransformer of FLASH-pytorch, got Linear",
    ):
        from_flash_pytorch(torch.nn.Linear(2, 2))
    with pytest.raises(
        TypeError, match="source: expected a module of FLASH-pytorch or its state dict, got list"
    ):
        from_flash_pytorch([])
    broken = {name: x for name, x in layer.state_dict().items() if name != "to_out.bias"}
    with pytest.raises(
        ValueError,
        match="source: 'to_out.bias' is missing, so these are not weights of FLASH-pytorch",
    ):
        from_flash_pytorch(broken, causal=True, group_size=G)
    with pytest.raises(
        ValueError,
        match="add_residual: these are weights of a FLASH layer, which has no such option",
    ):
        from_flash_pytorch(layer.state_dict(), causal=True, group_size=G, add_residual=False)
    unit = flash_pytorch.GAU(dim=D, query_key_dim=6)
    with pytest.raises(
        ValueError, match="shift_tokens: these are weights of a GAU, which has no such option"
    ):
        from_flash_pytorch(unit.state_dict(), causal=False, shift_tokens=True)
    odd = flash_pytorch.FLASHTransformer(num_tokens=50, dim=D, depth=1, query_key_dim=7)
    with pytest.raises(
        ValueError, match="source: rotation over an odd query_key_dim, .*, has no counterpart"
    ):
        from_flash_pytorch(odd)
    extra = {**layer.state_dict(), "more": torch.zeros(1)}
    with pytest.raises(ValueError, match="source: 'more' has no place in MixedChunkAttention"):
        from_flash_pytorch(extra, causal=True, group_size=G)
    rotary = flash_pytorch.FLASH(
        dim=D, query_key_dim=6, rotary_pos_emb=package.RotaryEmbedding(4, theta=500)
    )
    with pytest.raises(
        ValueError, match="source: its rotary frequencies are not those of base 10,000"
    ):
        from_flash_pytorch(rotary)
