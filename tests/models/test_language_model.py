"""The model as a Hugging Face model: shapes, cache, saving, gradients, initialisation, packed
documents.
"""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, set_seed

import cumulant as cm
from cumulant.models import (
    PRESETS,
    CumulantConfig,
    CumulantForCausalLM,
    ModelState,
    cache_bytes,
    export_state,
    from_preset,
    import_state,
)


def build(preset, **overrides):
    set_seed(0)
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    options |= {"sliding_window": 6, "group_size": 5, "query_key_dim": 12}
    options |= {"horizon": 15, "initializer_range": 0.3, "pad_token_id": 0} | overrides
    model = CumulantForCausalLM(from_preset(preset, **options)).double().eval()
    with torch.no_grad():  # what starts at or near zero
        for name, p in model.named_parameters():
            if "mixer.position" in name or "wrap_bias" in name or "logit_ffn" in name:
                p.normal_(std=0.3)
    return model


WRAPPED = {
    "mixers": ["elita", "softmax", "sliding_window", "flash", "gau", "linear", "short_convolution"],
    "num_hidden_layers": 7,
    "wraps": 3,
    "logit_ffn": 20,
    "norm": "rmsnorm",
    "norm_affine": False,
}


@pytest.fixture(params=[*PRESETS, "everything", "gated", "wrapped"])
def model(request):
    if request.param == "wrapped":
        return build("taylor", **WRAPPED)
    if request.param == "gated":
        return build(
            "flash",
            mixers=["gau", "flash", "taylor"],
            gated_activation="laplace",
            norm="layernorm",
            token_shift=False,
            feed_forward="swiglu",
            logits_bias=True,
            tie_word_embeddings=False,
        )
    if request.param == "everything":
        return build(
            "linear",
            mixers=["linear", "taylor", "softmax", "sliding_window", "short_convolution"],
            num_hidden_layers=5,
            num_key_value_heads=2,
            feature_map="hedgehog",
            qk_norm=True,
            taylor_alpha=2.0,
            token_shift=True,
            gate_values=True,
            feed_forward="gelu",
            tie_word_embeddings=False,
        )
    return build(request.param)


def tokens(*shape):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(0))


def test_pieces_onto_a_cache_are_the_whole(model):
    """Several tokens, one token, with and without a mask."""
    ids = tokens(2, 20)
    whole = model(ids).logits
    for cuts in ([20], [7, 1, 5, 7], [1] * 20):
        cache, seen, outs = DynamicCache(config=model.config), 0, []
        for piece in ids.split(cuts, 1):
            seen += piece.shape[1]
            mask = torch.ones(2, seen) if seen % 2 else None
            outs.append(model(piece, attention_mask=mask, past_key_values=cache).logits)
            assert cache.get_seq_length() == seen
        assert torch.allclose(torch.cat(outs, 1), whole, atol=1e-8)


def test_padding_on_either_side(model):
    ids = tokens(2, 12)
    lengths = [12, 5]
    for side in ("left", "right"):
        padded, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
        for i, n in enumerate(lengths):
            where = slice(12 - n, 12) if side == "left" else slice(0, n)
            padded[i, where], mask[i, where] = ids[i, :n], 1
        outputs = model(padded, attention_mask=mask, use_cache=True)
        more = tokens(2, 3)
        full = torch.cat((mask, torch.ones(2, 3, dtype=torch.long)), 1)
        after = model(more, attention_mask=full, past_key_values=outputs.past_key_values).logits
        for i, n in enumerate(lengths):
            alone = model(torch.cat((ids[i : i + 1, :n], more[i : i + 1]), 1)).logits[0]
            assert torch.allclose(outputs.logits[i][mask[i].bool()], alone[:n], atol=1e-8)
            assert torch.allclose(after[i], alone[n:], atol=1e-8)


def test_packed_documents_do_not_see_each_other(model):
    ids = tokens(1, 20)
    packed = model(ids, cu_seqlens=torch.tensor([0, 4, 15, 20])).logits
    for a, b in ((0, 4), (4, 15), (15, 20)):
        assert torch.allclose(packed[:, a:b], model(ids[:, a:b]).logits, atol=1e-9)


def test_saving_and_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, CumulantForCausalLM)
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    kept, restored = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(kept[name], restored[name]) for name in kept)
    ids = tokens(2, 9)
    assert torch.allclose(loaded.eval()(ids).logits, model(ids).logits, atol=1e-12)


def test_gradient_checkpointing_changes_nothing(model):
    ids = tokens(2, 12)
    found = []
    for enabled in (False, True):
        for block in model.model.layers:
            block.gradient_checkpointing = False
        if enabled:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert all(block.gradient_checkpointing for block in model.model.layers)
        model.train()
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-10)


def test_loss_is_the_mean_cross_entropy(model):
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits
    flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert torch.allclose(
        model(ids, labels=labels).loss.double(), torch.nn.functional.cross_entropy(*flat), atol=1e-6
    )
    shifted = model(ids[:, :-1], shift_labels=labels[:, 1:]).loss
    assert torch.allclose(shifted, model(ids, labels=labels).loss, atol=1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=4).loss
    assert torch.allclose(
        summed * 4, model(ids, labels=labels).loss * (labels[:, 1:] != -100).sum(), atol=1e-5
    )
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 50)


def test_hidden_states_and_tuples(model):
    ids = tokens(2, 7)
    outputs = model(ids, output_hidden_states=True, use_cache=False)
    assert len(outputs.hidden_states) == len(model.config.layer_types) + 1
    assert outputs.past_key_values is None
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, outputs.logits)
    assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)


def test_states_round_trip_through_a_file(model, tmp_path):
    ids = tokens(1, 15)
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    state = export_state(cache)
    assert isinstance(state, ModelState)
    assert state.position.tolist() == [9]
    cm.save_state(tmp_path / "s", state)
    restored = import_state(DynamicCache(config=model.config), cm.load_state(tmp_path / "s"))
    assert cache_bytes(restored) == cache_bytes(cache) > 0
    assert torch.allclose(
        model(ids[:, 9:], past_key_values=restored).logits, model(ids).logits[:, 9:], atol=1e-8
    )


def test_states_of_another_model():
    taylor, softmax = build("taylor"), build("softmax")
    cache = DynamicCache(config=taylor.config)
    with pytest.raises(ValueError, match="past_key_values: the cache is empty"):
        export_state(cache)
    taylor(tokens(1, 4), past_key_values=cache)
    with pytest.raises(
        ValueError,
        match="state: layer 0 holds a KernelAttentionState, which is not this model's mixer",
    ):
        import_state(DynamicCache(config=softmax.config), export_state(cache))
    with pytest.raises(
        ValueError,
        match="state: expected the state of a model with 4 layers, got ModelState with 3 layers",
    ):
        import_state(
            DynamicCache(config=build("taylor", num_hidden_layers=4).config), export_state(cache)
        )


def test_cache_is_reset_reordered_and_selected():
    model = build("based")
    ids = tokens(2, 12)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    more = tokens(2, 2)
    after = model(more, past_key_values=cache).logits
    assert torch.allclose(
        after[0], model(torch.cat((ids[1:], more[:1]), 1)).logits[0, 12:], atol=1e-8
    )
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    last = model(more[:, :1], past_key_values=cache).logits
    assert not torch.equal(more[0], more[1])
    for row in range(2):  # both go on from the second sequence
        expected = model(torch.cat((ids[1:], more[1:], more[row : row + 1, :1]), 1)).logits[0, -1]
        assert torch.allclose(last[row, 0], expected, atol=1e-8)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.allclose(model(ids, past_key_values=cache).logits, model(ids).logits, atol=1e-8)


def test_fixed_states_do_not_grow_with_context():
    sizes = {}
    for preset in ("taylor", "linear", "softmax", "based", "flash"):
        model, sizes[preset] = build(preset), []
        for length in (50, 100):
            cache = DynamicCache(config=model.config)
            model(tokens(1, length), past_key_values=cache)
            sizes[preset].append(cache_bytes(cache))
    assert sizes["taylor"][0] == sizes["taylor"][1]
    assert sizes["linear"][0] == sizes["linear"][1]
    assert sizes["based"][0] == sizes["based"][1]
    assert sizes["flash"][0] == sizes["flash"][1]
    assert sizes["softmax"][1] == pytest.approx(2 * sizes["softmax"][0], rel=0.01)


@pytest.mark.parametrize("mixer", ["flash", "gau", "softmax"])
def test_rotary_base_reaches_the_mixers(mixer):
    ids = tokens(1, 20)
    slow, fast = (build("flash", mixers=[mixer], rotary_base=base) for base in (10000.0, 10.0))
    fast.load_state_dict(slow.state_dict())
    assert not torch.allclose(slow(ids).logits, fast(ids).logits, atol=1e-4)


@pytest.mark.parametrize("mixer", ["flash", "gau"])
def test_counted_padding_onto_a_cache(mixer):
    """count_padding: pieces are the whole also where padding counts."""
    model = build("flash", mixers=[mixer], count_padding=True)
    ids, mask = tokens(2, 20), torch.ones(2, 20)
    mask[0, :7], mask[1, 3:5] = 0, 0
    whole, cache, outs, seen = (
        model(ids, attention_mask=mask).logits,
        DynamicCache(config=model.config),
        [],
        0,
    )
    for piece in ids.split([9, 1, 1, 9], 1):
        seen += piece.shape[1]
        outs.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(outs, 1)[mask.bool()], whole[mask.bool()], atol=1e-9)


def test_a_flash_step_costs_the_same_at_any_context():
    """Counted, not timed: every operation of one step, with its shapes, after 60 and after 3,000
    tokens, which stand at the same place of a group."""
    model, counts = build("flash", group_size=20).float(), []
    for length in (60, 3000):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(1, length), past_key_values=cache)
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
            model(tokens(1, 1), past_key_values=cache)
        events = profile.key_averages(group_by_input_shape=True)
        counts.append({(event.key, str(event.input_shapes)): event.count for event in events})
    assert counts[0] == counts[1]
    assert any("20, 12" in shapes for _, shapes in counts[0])  # the open group is read


@pytest.mark.parametrize("preset", PRESETS)
def test_initialisation_trains_at_depth(preset):
    """24 layers: logits start near zero, hidden states keep their size, gradients reach every layer
    alike.
    """
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
    """A stack of two layers, three times, is a stack of six whose layers repeat, with a bias before
    each time.
    """
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
    """x + attention(norm(x)), then x + feed_forward(norm(x)), norms without anything learned, tied
    embeddings.
    """
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
        match="feature_map: expected one of elu, relu, .*, hedgehog, rebased, got 'gelu'",
    ):
        CumulantConfig(feature_map="gelu")
    with pytest.raises(ValueError, match="dropout: expected a probability below 1, got 1.5"):
        CumulantConfig(dropout=1.5)
    with pytest.raises(
        ValueError,
        match=(
            "preset: expected one of softmax, linear, taylor, higher_order, based, flash, elita,"
            " got 'gpt'"
        ),
    ):
        from_preset("gpt")
    with pytest.raises(ValueError, match="hiden_size: not a field of CumulantConfig"):
        from_preset("taylor", hiden_size=3)


def test_call_errors():
    model = build("based")
    ids = tokens(2, 5)
    with pytest.raises(
        ValueError, match=r"input_ids: pass either input_ids \[B, T\] or inputs_embeds"
    ):
        model()
    with pytest.raises(
        ValueError,
        match=(
            r"attention_mask: expected \[B, S \+ T\] = \[2, 5\], 0 cached positions and 5 new ones,"
            r" got \[2, 6\]"
        ),
    ):
        model(ids, attention_mask=torch.ones(2, 6))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"5 cached positions and 2 new ones, got \[2, 2\]"):
        model(ids[:, :2], past_key_values=cache, attention_mask=torch.ones(2, 2))
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(ids, atention_mask=torch.ones(2, 5))
