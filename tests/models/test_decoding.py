"""The loop of `generate` equals transformers' own, with one native call a token."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    StaticCache,
    StoppingCriteria,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from cumulant.kernels.native import bound_program
from cumulant.models import PRESETS, CumulantForCausalLM, decoding, from_preset, quantize
from cumulant.models.cache import read_state
from cumulant.models.decoding import QuickTopP
from cumulant.models.step import Decoder, step_model
from cumulant.ops import step as native_step
from cumulant.ops.step import Unsuitable

IDS = torch.randint(1, 70, (3, 11), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0
OPTIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "temperature, top-k": {"do_sample": True, "temperature": 0.6, "top_k": 9},
    "top-p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "repetition penalty": {"do_sample": True, "repetition_penalty": 1.4, "top_p": 0.9},
    "ends": {"do_sample": True, "eos_token_id": [5, 6, 7, 8, 9], "pad_token_id": 0},
    "no repeats": {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
}
STEPPED = [
    "taylor",
    "gated_linear",
    "higher_order",
    "softmax",
    "based",
    "gated_based",
    "flash",
    "elita",
]


def build(preset, **fields):
    torch.manual_seed(0)
    options = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    options |= {"vocab_size": 70, "initializer_range": 0.3, "sliding_window": 6, "group_size": 5}
    return CumulantForCausalLM(from_preset(preset, **options | fields)).eval()


def transformers_loop(model, ids, **options):
    sample = type(model)._sample
    type(model)._sample = GenerationMixin._sample
    try:
        return generate(model, ids, **options)
    finally:
        type(model)._sample = sample


def generate(model, ids, **options):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": 25, **options})


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_it_draws_what_transformers_draws(preset, name):
    model = build(preset)
    for ids, mask in ((IDS[:1], None), (IDS, PADDED)):
        options = {"attention_mask": torch.ones_like(ids) if mask is None else mask}
        options |= OPTIONS[name]
        assert torch.equal(
            generate(model, ids, **options), transformers_loop(model, ids, **options)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtypes_change_nothing(dtype):
    model = build("elita")
    expected = generate(model, IDS)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(generate(model, IDS), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", STEPPED)
def test_half_precision_too(preset, dtype, monkeypatch):
    model = build(preset).to(dtype)
    for name in ("greedy", "top-p"):
        options = OPTIONS[name] | {"attention_mask": torch.ones_like(IDS)}
        expected = transformers_loop(model, IDS, **options)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "Forward", None)  # a decoder of its own takes all tokens
            assert torch.equal(generate(model, IDS, **options), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_models_too(bits):
    model = quantize(build("gated_taylor"), bits)
    options = OPTIONS["repetition penalty"]
    assert torch.equal(generate(model, IDS, **options), transformers_loop(model, IDS, **options))


@pytest.mark.parametrize("preset", STEPPED)
def test_one_forward_and_then_native_steps(preset, monkeypatch):
    model, calls = build(preset), []
    forward = CumulantForCausalLM.forward
    steps = []
    monkeypatch.setattr(
        Decoder, "step", lambda self, ids, step=Decoder.step: steps.append(1) or step(self, ids)
    )
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, IDS[:1])
    assert (len(calls), len(steps)) == (25, 0)  # hooks are called for every token
    model = build(preset)
    generate(model, IDS[:1])
    assert len(steps) == 24
    assert CumulantForCausalLM.forward is forward


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cache_is_left_as_forward_leaves_it(preset):
    model, cache, expected = (
        build(preset),
        *(DynamicCache(config=build(preset).config) for _ in "ab"),
    )
    out = generate(model, IDS, past_key_values=cache, do_sample=False)
    with torch.no_grad():
        model(out[:, :-1], past_key_values=expected)
        a, b = (model(out[:, -1:], past_key_values=c).logits for c in (cache, expected))
    assert cache.get_seq_length() == expected.get_seq_length()
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    # and it goes on from there
    whole = generate(model, IDS, max_new_tokens=33, do_sample=False)
    cache = DynamicCache(config=model.config)
    out = generate(model, IDS, past_key_values=cache, do_sample=False, max_new_tokens=20)
    more = generate(model, out, past_key_values=cache, do_sample=False, max_new_tokens=13)
    assert torch.equal(more, whole)


class Recorder(BaseStreamer):
    def __init__(self, fails_at=None):
        self.got, self.ended, self.fails_at = [], False, fails_at

    def put(self, value):
        self.got.append(value.clone())
        if len(self.got) == self.fails_at:
            raise OSError("gone")

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_streamers_and_criteria(preset):
    model, found = build(preset), []
    for loop in (generate, transformers_loop):
        streamer = Recorder()
        ids = loop(model, IDS[:1], streamer=streamer, stopping_criteria=[After(20)])
        assert ids.shape[1] == 20
        assert streamer.ended
        found.append([ids, *streamer.got])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_a_reader_that_is_gone_leaves_a_whole_cache(preset):
    model = build(preset)
    cache, streamer = DynamicCache(config=model.config), Recorder(fails_at=6)
    with pytest.raises(OSError, match="gone"):
        generate(model, IDS[:1], past_key_values=cache, streamer=streamer, do_sample=False)
    new = torch.cat(streamer.got[1:])[None]
    assert cache.get_seq_length() == 11 + 4  # all but the last token
    expected = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.cat((IDS[:1], new[:, :-1]), 1), past_key_values=expected)
        a, b = (model(new[:, -1:], past_key_values=c).logits for c in (cache, expected))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_an_interruption_leaves_a_whole_cache(preset, monkeypatch):
    """Python raises it when the native call has returned, and its states are changed by then."""
    model, calls = build(preset), []
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    whole = generate(model, IDS, do_sample=False)

    def interrupted(*arguments, call=bound_program.call_library):
        call(*arguments)
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(bound_program, "call_library", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, IDS, past_key_values=cache, do_sample=False)
    monkeypatch.undo()
    assert cache.get_seq_length() == 11 + 7
    with torch.no_grad():
        model(whole[:, :18], past_key_values=expected)
        a, b = (model(whole[:, 18:19], past_key_values=c).logits for c in (cache, expected))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_an_error_in_a_token_leaves_the_cache_as_it_was(monkeypatch):
    model, cache = build("gated_taylor"), DynamicCache(config=build("gated_taylor").config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        before = [read_state(cache, i, None).clone() for i in range(3)]
        decoder = Decoder(model, cache)
        decoder.step(IDS[:, 0])

        def fails(*arguments):
            raise MemoryError

        monkeypatch.setattr(bound_program, "call_library", fails)
        with pytest.raises(MemoryError):
            decoder.step(IDS[:, 1])
        decoder.close()
    assert cache.get_seq_length() == 11
    for i, state in enumerate(before):
        now = read_state(cache, i, None).tensors()
        assert all(torch.equal(x, now[name]) for name, x in state.tensors().items())


@pytest.mark.parametrize("preset", [*STEPPED, "gated_taylor"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_whole_step_equals_the_layers(preset, rows, monkeypatch):
    model = build(preset)
    one, two, three = (DynamicCache(config=model.config) for _ in range(3))
    with torch.no_grad():
        for cache in (one, two, three):
            model(IDS[:rows], past_key_values=cache)
        decoder = Decoder(model, three)
        for t in range(6):
            new = IDS[:rows, t : t + 1]
            stepped = step_model(model, new, None, one, {}).logits
            own = decoder.step(new[:, 0]).clone()
            with monkeypatch.context() as patch:
                patch.setattr(native_step, "MOST_ROWS", 0)
                expected = model(new, past_key_values=two).logits
            torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(own, stepped[:, 0])
    assert three.get_seq_length() == 11  # until it is closed
    decoder.close()
    for cache in (one, three):
        assert cache.get_seq_length() == two.get_seq_length() == 17
        for i in range(3):
            state, other = read_state(cache, i, None), read_state(two, i, None)
            assert state.tensors().keys() == other.tensors().keys()
            for x, y in zip(state.tensors().values(), other.tensors().values()):
                assert x.shape == y.shape
                assert (x - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("preset", ["softmax", "based"])
def test_steps_over_many_tokens_and_padding(preset, monkeypatch):
    """Memory of keys and values grows, and windows move along it."""
    monkeypatch.setattr(bound_program, "ROOM", 3)
    model = build(preset)
    cache, ids = DynamicCache(config=model.config), torch.randint(1, 70, (3, 60))
    with torch.no_grad():
        model(IDS, attention_mask=PADDED, past_key_values=cache)
        decoder = Decoder(model, cache, PADDED)
        steps = [decoder.step(new).clone() for new in ids.unbind(1)]
        decoder.close()
        mask = torch.cat((PADDED, torch.ones_like(ids)), 1)
        whole = model.double()(torch.cat((IDS, ids), 1), attention_mask=mask).logits
        torch.testing.assert_close(
            torch.stack(steps, 1).double(), whole[:, 11:], rtol=1e-4, atol=1e-4
        )
        more = model.float()(
            ids[:, :2], attention_mask=torch.cat((mask, mask[:, -2:]), 1), past_key_values=cache
        ).logits
        ids = torch.cat((IDS, ids, ids[:, :2]), 1)
        expected = model.double()(ids, attention_mask=torch.cat((mask, mask[:, -2:]), 1)).logits
    torch.testing.assert_close(more.double(), expected[:, -2:], rtol=1e-4, atol=1e-4)


def test_a_static_cache_is_left_to_forward():
    model = build("softmax")
    options = {"cache_implementation": "static", "do_sample": False, "disable_compile": True}
    assert torch.equal(generate(model, IDS, **options), generate(model, IDS, do_sample=False))
    cache = StaticCache(config=model.config, max_cache_len=14)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(Unsuitable):
            Decoder(model, cache)
        with pytest.raises(ValueError, match="max_cache_len=14 cannot"):
            generate(model, IDS, past_key_values=StaticCache(model.config, 14), do_sample=False)


def test_masks_between_tokens_are_left_to_forward():
    model, mask = build("softmax"), torch.ones_like(IDS)
    mask[1, 4] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, attention_mask=mask, past_key_values=cache)
        with pytest.raises(Unsuitable):
            Decoder(model, cache, mask)
    options = {"attention_mask": mask, "do_sample": False}
    assert torch.equal(generate(model, IDS, **options), transformers_loop(model, IDS, **options))


def test_a_step_of_the_model_calls_what_the_user_has_changed():
    """Subclasses, methods of an instance, hooks on any part, and caches that record their past."""

    class Louder(CumulantForCausalLM):
        def logits(self, hidden):
            return super().logits(hidden) * 2

    for change in ("subclass", "method", "hook", "norm's hook", "record", "plain"):
        model = build("taylor")
        if change == "subclass":
            model.__class__ = Louder
        if change == "method":
            model.logits = lambda hidden, own=model.logits: own(hidden) * 2
        cache = DynamicCache(config=model.config)
        if change == "hook":
            model.model.register_forward_hook(lambda *_: None)
        if change == "norm's hook":
            model.model.norm.register_forward_hook(lambda *_: None)
        if change == "record":
            cache.activate_past_recording()
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            stepped = step_model(model, IDS[:, :1], None, cache, {})
            assert (stepped is not None) == (change == "plain"), change
            if change != "plain":
                with pytest.raises(Unsuitable):
                    Decoder(model, cache)


def test_wrong_masks_and_ids_still_raise():
    model, cache = build("taylor"), DynamicCache(config=build("taylor").config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask: expected"):
            model(IDS[:, :1], attention_mask=torch.ones(3, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="input_ids: expected ids from 0 to"):
            model(IDS[:, :1] + 700, past_key_values=cache)
        with pytest.raises(TypeError, match="unexpected keyword argument 'attn_mask'"):
            model(IDS[:, :1], past_key_values=cache, attn_mask=None)
    assert cache.get_seq_length() == 11


class Counting(TopPLogitsWarper):
    def __call__(self, input_ids, scores):
        self.calls.append(1)
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("seed", range(6))
def test_quick_top_p_is_top_p(seed, monkeypatch):
    """At any p and spread, with ties, and where rounding could decide."""
    generator = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(decoding, "SMALL", 8)
    quick = 0
    for size in (300, 5000):
        for p in (0.01, 0.3, 0.9, 0.999, 1.0):
            for spread in (0.1, 2.0, 8.0):
                scores = torch.randn(2, size, generator=generator) * spread
                if seed % 2:
                    scores = scores.round()  # many ties
                scores[0, 3] = -torch.inf
                for least in (1, 5):
                    warper, calls = Counting(p, min_tokens_to_keep=least), []
                    warper.calls = calls
                    found = QuickTopP(warper)(None, scores)
                    quick += not calls
                    assert torch.equal(found, warper(None, scores))
    assert quick > 0
