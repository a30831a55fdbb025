"""Each kind of transformers' caches gives the same tokens, or an error that names one to use."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer

from cumulant.models import PRESETS, export_state, import_state

from ..models.common import build, tokens
from .test_assisted import HYBRID, llama

NAMES = [*PRESETS, "hybrid"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def model_of(name):
    model = build("taylor", **HYBRID) if name == "hybrid" else build(name)
    model.generation_config.pad_token_id = None  # every token counts, 0 too
    return model


@pytest.fixture(params=NAMES)
def model(request):
    return model_of(request.param)


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_kinds_by_name(model, kind):
    ids = tokens(2, 9)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, cache_implementation=kind), expected)


CACHES = {
    "bare": lambda config: DynamicCache(),
    "of the model": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=30),
    "offloaded": lambda config: DynamicCache(config=config, offloading=True),
}


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_caches_handed_in(model, kind):
    """A cache is used in one call, in pieces, with padding, with beams, and for a second turn."""
    ids = tokens(2, 9)
    cache = CACHES[kind](model.config)
    pieces = [
        model(piece, past_key_values=cache).logits for piece in ids[:, :8].split([4, 1, 3], 1)
    ]
    assert torch.allclose(torch.cat(pieces, 1), model(ids[:, :8]).logits, atol=1e-9)
    assert cache.get_seq_length() == 8
    state = export_state(cache)
    kept = {name: x.clone() for name, x in state.tensors().items()}
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    assert all(torch.equal(x, kept[name]) for name, x in state.tensors().items()), (
        "an exported state was written in"
    )
    longer = torch.cat((expected, tokens(2, 3)), 1)
    again = model.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, model.generate(longer, max_new_tokens=4, do_sample=False))

    fresh = import_state(DynamicCache(config=model.config), state)
    assert torch.equal(model.generate(ids, past_key_values=fresh, **GREEDY), expected)

    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = GREEDY | {"attention_mask": mask}
    padded = model.generate(ids, past_key_values=CACHES[kind](model.config), **options)
    assert torch.equal(padded[1, 9:], model.generate(ids[1:, 5:], **GREEDY)[0, 4:])
    beams = model.generate(ids, num_beams=3, past_key_values=CACHES[kind](model.config), **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))


@torch.no_grad()
def test_a_reset_cache_is_a_fresh_one(model):
    ids = tokens(2, 9)
    for kind in ("of the model", "static"):
        cache = CACHES[kind](model.config)
        model(tokens(2, 5) * 0 + 3, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.allclose(
            model(ids, past_key_values=cache).logits, model(ids).logits, atol=1e-9
        )


def test_offloading_moves_keys_and_values(monkeypatch):
    """They leave after each layer, and come back before it."""
    moves = []
    for name in ("offload", "prefetch"):
        original = getattr(DynamicLayer, name)
        monkeypatch.setattr(
            DynamicLayer, name, lambda self, f=original, n=name: (moves.append(n), f(self))
        )
    build("softmax").generate(
        tokens(1, 5), max_new_tokens=3, do_sample=False, cache_implementation="offloaded"
    )
    assert moves == ["offload"] * 3 + ["prefetch", "offload"] * 6  # three layers, read three times


def test_a_prompt_that_the_cache_has_seen_wholly():
    """It would be read twice."""
    model, ids = build("taylor"), tokens(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(
        ValueError,
        match="past_key_values: has seen 6 tokens and input_ids holds 6; generation needs",
    ):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3
        )


def test_static_caches_that_are_full():
    model = build("softmax")
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(tokens(1, 6), past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"max_cache_len=8 cannot hold 6 \+ 3 tokens; make it larger"
    ):
        model(tokens(1, 3), past_key_values=cache)
    assert cache.get_seq_length() == 6
    linear = build("linear")  # whose states have no length
    model_cache = StaticCache(config=linear.config, max_cache_len=8)
    assert linear(tokens(1, 20), past_key_values=model_cache).logits.shape[1] == 20


def test_caches_that_cannot_be():
    model, ids = build("based"), tokens(1, 4)
    keys = tuple((torch.zeros(1, 4, 3, 8),) * 2 for _ in range(3))
    with pytest.raises(
        TypeError, match=r"past_key_values: expected a transformers Cache, got tuple; build it with"
    ):
        model(ids, past_key_values=keys)
    with pytest.raises(ValueError, match="tuple of `past_key_values` is not supported"):
        model.generate(ids, past_key_values=keys, **GREEDY)
    with pytest.raises(TypeError, match="got EncoderDecoderCache; build it with"):
        model(ids, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(
        ValueError, match="cache_implementation: 'quantized' cannot hold .* use 'dynamic'"
    ):
        model.generate(ids, cache_implementation="quantized", **GREEDY)
    softmax = build("softmax")
    with pytest.raises(
        TypeError, match="layer 0 is a Fp8QuantizedLayer of a QuantizedCache, which cannot hold"
    ):
        softmax(ids, past_key_values=QuantizedCache("fp8", softmax.config))
    with pytest.raises(
        TypeError,
        match="layer 0 is a DynamicLayer of a DynamicCache, which cannot hold this model's",
    ):
        model(ids, past_key_values=DynamicCache(config=softmax.config))
    with pytest.raises(
        ValueError,
        match="past_key_values: expected 3 layers, as the model has, got 2; build it with",
    ):
        model(ids, past_key_values=DynamicCache(config=build("based", num_hidden_layers=2).config))
    full = llama()(tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(
        TypeError,
        match="past_key_values: layer 0 is a DynamicLayer of a DynamicCache, which cannot hold",
    ):
        model(ids, past_key_values=full)


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_continuous_batching_is_refused(name):
    with pytest.raises(
        ValueError,
        match="generate_batch: continuous batching keeps keys .* use generate with a padded",
    ):
        build(name).generate_batch([[1, 2, 3], [4, 5]])


def test_more_than_one_sequence_and_scores(model):
    ids = tokens(2, 9)
    assert model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=4).shape == (
        6,
        13,
    )
    assert torch.equal(model.generate(ids, max_time=60.0, **GREEDY), model.generate(ids, **GREEDY))
    guided = GREEDY | {"guidance_scale": 1.5}
    assert torch.equal(
        model.generate(ids, **guided), model.generate(ids, use_cache=False, **guided)
    )
