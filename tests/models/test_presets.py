"""Presets and their options: initialisation, training, wraps, the published trunk, refusals."""

import math

import pytest
import torch

from cumulant.models import (
    PRESETS,
    CumulantConfig,
    from_preset,
)

from .common import build, tokens


@pytest.mark.parametrize("mixer", ["flash", "gau", "softmax"])
def test_rotary_base_reaches_the_mixers(mixer):
    ids = tokens(1, 20)
    slow, fast = (build("flash", mixers=[mixer], rotary_base=base) for base in (10000.0, 10.0))
    fast.load_state_dict(slow.state_dict())
    assert not torch.allclose(slow(ids).logits, fast(ids).logits, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_initialisation_trains_at_depth(preset):
    """In 24 layers logits start near zero, and gradients reach every layer alike."""
    model = build(
        preset, num_hidden_layers=24, initializer_range=0.02, hidden_size=64, group_size=24
    ).float()
    ids = tokens(2, 60)
    outputs = model(ids, labels=ids, output_hidden_states=True)
    assert outputs.loss.item() == pytest.approx(math.log(50), rel=0.02)
    first, last = (outputs.hidden_states[i].norm() for i in (0, -2))
    assert last < 10 * first
    outputs.loss.backward()
    norms = [block.mixer.out_proj.weight.grad.norm().item() for block in model.model.layers]
    assert max(norms) < 100 * min(norms)
    output = [block.mixer.out_proj.weight.std().item() for block in model.model.layers]
    assert output[0] == pytest.approx(0.02 / math.sqrt(48), rel=0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_overfits_a_sentence(preset):
    model = build(preset, initializer_range=0.02).float().train()
    ids = tokens(1, 16).repeat(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("preset", ["elita", "taylor"])
def test_wraps_run_the_same_stack_again(preset):
    """Two layers three times are six layers that repeat, with a bias before each time."""
    wrapped = build(preset, num_hidden_layers=2, wraps=3)
    long = build(preset, num_hidden_layers=6)
    assert wrapped.num_parameters() == build(preset, num_hidden_layers=2).num_parameters() + 3 * 32
    long.model.embed_tokens.load_state_dict(wrapped.model.embed_tokens.state_dict())
    long.model.norm.load_state_dict(wrapped.model.norm.state_dict())
    for i, block in enumerate(long.model.layers):
        block.load_state_dict(wrapped.model.layers[i % 2].state_dict())
        if i % 2 == 0:
            bias = wrapped.model.wrap_bias[i // 2].detach()
            block.register_forward_pre_hook(lambda _, args, bias=bias: (args[0] + bias, *args[1:]))
    ids = tokens(2, 11)
    assert torch.allclose(wrapped(ids).logits, long(ids).logits, atol=1e-10)
    wrapped(ids, labels=ids).loss.backward()
    assert wrapped.model.wrap_bias.grad.abs().sum(1).min() > 0
    assert (
        len(wrapped.generate(ids[:1, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)[0])
        == 7
    )


def test_the_elita_preset_is_the_published_trunk():
    """Attention and feed-forward follow plain norms, on residuals; embeddings are tied."""
    model = build("elita")
    names = {
        name.split(".", 3)[-1].rpartition(".")[0]
        for name, _ in model.named_parameters()
        if "layers.0" in name
    }
    parts = {"logit_proj", "position", "v_proj", "out_proj"}
    assert names == {f"mixer.{p}" for p in parts} | {
        f"feed_forward.{p}" for p in ("hidden_proj", "factor_proj", "out_proj")
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokens(1, 9)
    x = model.model.embed_tokens(ids)
    plain = lambda z: torch.nn.functional.layer_norm(z, z.shape[-1:], eps=model.config.norm_eps)  # noqa: E731
    for block in model.model.layers:
        x = x + block.mixer(plain(x))
        x = x + block.feed_forward(plain(x))
    assert torch.allclose(model(ids).logits, plain(x) @ model.lm_head.weight.T, atol=1e-10)


def test_configuration_errors():
    with pytest.raises(
        ValueError, match=r"mixers: expected a list of softmax, .*taylor.*, got \['mamba'\]"
    ):
        CumulantConfig(mixers=["taylor", "mamba"])
    with pytest.raises(
        ValueError, match="feed_forward: expected one of swiglu, gelu, elita, none, got 'relu'"
    ):
        CumulantConfig(feed_forward="relu")
    with pytest.raises(ValueError, match="num_attention_heads: 3 must divide hidden_size=256"):
        CumulantConfig(num_attention_heads=3)
    with pytest.raises(
        ValueError, match="num_key_value_heads: 3 must divide num_attention_heads=4"
    ):
        CumulantConfig(num_key_value_heads=3)
    with pytest.raises(ValueError, match="num_hidden_layers: expected at least 1, got 0"):
        CumulantConfig(num_hidden_layers=0)
    for bad in (0, -1.0, float("inf")):
        with pytest.raises(
            ValueError, match=f"taylor_alpha: expected a positive number, got {bad}"
        ):
            CumulantConfig(taylor_alpha=bad)
    with pytest.raises(ValueError, match="taylor_order: expected int, got 2.5"):
        CumulantConfig(taylor_order=2.5)
    with pytest.raises(ValueError, match="taylor_order: expected at least 1, got 0"):
        CumulantConfig(taylor_order=0)
    with pytest.raises(
        ValueError,
        match="feature_map: expected one of elu, relu, .*, hedgehog, rebased, got 'gelu'",
    ):
        CumulantConfig(feature_map="gelu")
    with pytest.raises(ValueError, match="dropout: expected a probability below 1, got 1.5"):
        CumulantConfig(dropout=1.5)


def test_preset_errors():
    with pytest.raises(ValueError, match="rotary: expected bool, got 'False'"):
        from_preset("flash", rotary="False")
    with pytest.raises(ValueError, match="group_size: expected int, got 64.0"):
        from_preset("flash", group_size=64.0)
    with pytest.raises(
        ValueError, match="norm: expected one of layernorm, rmsnorm, scalenorm, got 'batchnorm'"
    ):
        from_preset("flash", norm="batchnorm")
    for name in ("group_size", "query_key_dim"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            from_preset("flash", **{name: 0})
    for name in ("wraps", "horizon", "position_features", "feed_forward_factor"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            from_preset("elita", **{name: 0})
    with pytest.raises(ValueError, match="horizon_time: expected a finite number, got nan"):
        from_preset("elita", horizon_time=float("nan"))
    with pytest.raises(ValueError, match="wraps: expected int, got 2.5"):
        from_preset("elita", wraps=2.5)
    with pytest.raises(
        ValueError, match="logit_ffn: expected a width of at least 1, or None for none, got 0"
    ):
        from_preset("elita", logit_ffn=0)
    with pytest.raises(
        ValueError,
        match="norm_affine: a scalenorm is its learned scale; choose layernorm or rmsnorm",
    ):
        from_preset("flash", norm_affine=False)
    with pytest.raises(ValueError, match="mixers: elita looks backwards only; an encoder"):
        from_preset("elita", is_causal=False)
    with pytest.raises(ValueError, match="length_scale: expected a positive number, got -1"):
        from_preset("flash", mixers=["gau"], length_scale=-1)
    assert from_preset("flash", hidden_size=30).hidden_size == 30  # no heads to divide it
    with pytest.raises(
        ValueError,
        match=(
            "preset: expected one of softmax, linear, taylor, higher_order, based, flash, elita,"
            " gated_linear, gated_taylor, gated_based, got 'gpt'"
        ),
    ):
        from_preset("gpt")
    with pytest.raises(ValueError, match="hiden_size: not a field of CumulantConfig"):
        from_preset("taylor", hiden_size=3)
