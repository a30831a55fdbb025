"""The model's cache: states of other models, reordering, sizes, padding, and the cost of a step."""

import pytest
import torch
from transformers import DynamicCache

from cumulant.models import (
    cache_bytes,
    export_state,
    import_state,
)
from cumulant.ops import step as native_step

from .common import build, tokens


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
    for preset in ("taylor", "linear", "softmax", "based", "flash", "gated_based"):
        model, sizes[preset] = build(preset), []
        for length in (50, 100):
            cache = DynamicCache(config=model.config)
            model(tokens(1, length), past_key_values=cache)
            sizes[preset].append(cache_bytes(cache))
    assert sizes["taylor"][0] == sizes["taylor"][1]
    assert sizes["linear"][0] == sizes["linear"][1]
    assert sizes["based"][0] == sizes["based"][1]
    assert sizes["flash"][0] == sizes["flash"][1]
    assert sizes["gated_based"] == sizes["based"]
    assert sizes["softmax"][1] == pytest.approx(2 * sizes["softmax"][0], rel=0.01)


@pytest.mark.parametrize("mixer", ["flash", "gau"])
def test_counted_padding_onto_a_cache(mixer):
    """With count_padding, splits give the whole's logits, although padding counts."""
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


def test_a_flash_step_costs_the_same_at_any_context(monkeypatch):
    """A step runs the same operations, of the same shapes, after 60 and after 3,000 tokens.

    Both lengths end at the same position of a group.
    """
    monkeypatch.setattr(native_step, "MOST_ROWS", 0)  # in a native step no shapes are seen
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
