"""The model as a Hugging Face model: padding, packing, saving, gradients, outputs, bad calls."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import cumulant as cm
from cumulant.models import (
    PRESETS,
    CumulantForCausalLM,
    ModelState,
    cache_bytes,
    export_state,
    import_state,
)

from .common import WRAPPED, build, tokens


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
