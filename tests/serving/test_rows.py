"""Rows of one step are computed as if each were alone, bit for bit."""

import pytest
import torch
from transformers import DynamicCache

from cumulant.models import PRESETS, quantize
from cumulant.models.rows import (
    NativeRows,
    SeparateRows,
    cache_bytes_after,
    grows,
    make_rows,
    row_bytes,
)

from .common import build, prompt

LENGTHS = (1, 5, 23, 40, 9)


def caches(model):
    found = []
    for i, length in enumerate(LENGTHS):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt(length, i)]), past_key_values=cache, use_cache=True)
        found.append(cache)
    return found


def tokens(step, row):
    return (step * 7 + row * 31) % 250


@pytest.mark.parametrize("kind", [NativeRows, SeparateRows])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others(preset, kind):
    model = build(preset)
    alone = []
    for i, cache in enumerate(caches(model)):
        rows = kind(model, 1, 64) if kind is NativeRows else kind(model, 1)
        rows.write(0, cache)
        alone.append([rows.step(torch.tensor([tokens(t, i)]))[0].clone() for t in range(20)])
    together = kind(model, 5, 64) if kind is NativeRows else kind(model, 5)
    for i, cache in enumerate(caches(model)):
        together.write(i, cache)
    places = list(range(5))
    for t in range(20):
        logits = together.step(torch.tensor([tokens(t, i) for i in places]))
        for row, i in enumerate(places):
            assert torch.equal(logits[row], alone[i][t]), (t, i)
        if t in (3, 8, 13):  # one leaves, and the last takes its place
            gone = t % len(places)
            last = places.pop()
            if gone < len(places):
                together.move(len(places), gone)
                places[gone] = last


@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_they_follow_the_model(preset):
    model = build(preset)
    rows = make_rows(model, 5, 64)
    assert isinstance(rows, NativeRows)
    found = caches(model)
    for i, cache in enumerate(found):
        rows.write(i, cache)
    for t in range(20):
        ids = torch.tensor([tokens(t, i) for i in range(5)])
        logits = rows.step(ids)
        for i, cache in enumerate(found):
            expected = model(ids[i : i + 1, None], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[i], expected[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.inference_mode()
def test_threads_and_many_rows_change_nothing(threads):
    """Wide layers, whose matrices and states are shared out over the threads."""
    model = build("gated_based", hidden_size=256, num_attention_heads=4)
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt(30)]), past_key_values=cache, use_cache=True)
    alone = make_rows(model, 1, 1)
    alone.write(0, cache)
    expected = [alone.step(torch.tensor([tokens(t, 0)])).clone() for t in range(4)]
    torch.set_num_threads(threads)
    rows = make_rows(model, 33, 1)
    for row in range(33):
        rows.write(row, cache)
    for t in range(4):
        logits = rows.step(torch.full((33,), tokens(t, 0)))
        assert torch.equal(logits, expected[t].expand(33, -1))


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_quantised_models(bits, isa):
    model = quantize(build("based"), bits)
    found = caches(model)
    rows, alone = make_rows(model, 5, 64), make_rows(model, 1, 64)
    for i, cache in enumerate(found):
        rows.write(i, cache)
    logits = rows.step(torch.arange(5))
    for i, cache in enumerate(found):
        alone.write(0, cache)
        assert torch.equal(alone.step(torch.tensor([i]))[0], logits[i])


@torch.inference_mode()
def test_a_full_context_is_refused_and_windows_go_on():
    model = build("softmax")
    rows = make_rows(model, 2, 42)
    rows.write(0, caches(model)[3])
    rows.step(torch.tensor([1]))
    rows.step(torch.tensor([1]))
    with pytest.raises(RuntimeError, match="no room"):
        rows.step(torch.tensor([1]))


@torch.inference_mode()
def test_models_without_a_program_take_their_layers():
    model = build("taylor")
    model.model.layers[0].register_forward_hook(lambda *a: None)
    assert isinstance(make_rows(model, 2, 1), SeparateRows)
    assert isinstance(make_rows(build("taylor").double(), 2, 1), SeparateRows)


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_of_a_row_and_of_a_cache(preset):
    model = build(preset)
    with torch.inference_mode():
        rows = make_rows(model, 3, 50)
    states = [*rows._rows._states, *rows._rows._next.values()]
    held = sum(s.numel() * s.element_size() for s in states) // 3
    assert held <= row_bytes(model, 50) <= held + 4 * model.config.vocab_size
    assert grows(model) == (preset == "softmax")
    with torch.inference_mode():
        cache = caches(model)[3]
    from cumulant.models import cache_bytes

    assert cache_bytes(cache) == pytest.approx(cache_bytes_after(model, 40), rel=0.05)
