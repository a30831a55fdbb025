"""Tokens of many sequences in one run are computed as if each sequence were alone, bit for bit."""

import pytest
import torch
from transformers import DynamicCache

from cumulant.models import PRESETS, cache_bytes, export_state, quantize
from cumulant.models.rows import (
    NativeRows,
    Piece,
    SeparateRows,
    cache_bytes_after,
    grows,
    make_rows,
    reads_exactly,
    rows_bytes,
)

from .common import build, prompt

LENGTHS = (1, 5, 23, 40, 9)
MOST = 16
EXACT = [p for p in PRESETS if p not in ("softmax", "flash")]


def caches(model):
    found = []
    for i, length in enumerate(LENGTHS):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt(length, i)]), past_key_values=cache, use_cache=True)
        found.append(cache)
    return found


def tokens(step, row):
    return (step * 7 + row * 31) % 250


def make(kind, model, slots, room=64):
    return kind(model, slots, room, MOST) if kind is NativeRows else kind(model)


def same(a, b):
    mine, other = a.tensors(), b.tensors()
    return mine.keys() == other.keys() and all(torch.equal(mine[n], other[n]) for n in mine)


@pytest.mark.parametrize("kind", [NativeRows, SeparateRows])
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_a_sequence_does_not_depend_on_the_others(preset, kind):
    model = build(preset)
    alone = []
    for i, cache in enumerate(caches(model)):
        rows = make(kind, model, 1)
        rows.load(0, export_state(cache))
        alone.append([rows.run([Piece(0, [tokens(t, i)])])[0].clone() for t in range(20)])
    together = make(kind, model, 6)
    slots = {i: (i * 2) % 5 for i in range(5)}
    for i, cache in enumerate(caches(model)):
        together.load(slots[i], export_state(cache))
    for t in range(20):
        order = sorted(slots, key=lambda i: (i * 3 + t) % 5)
        logits = together.run([Piece(slots[i], [tokens(t, i)]) for i in order])
        for row, i in enumerate(order):
            assert torch.equal(logits[row], alone[i][t]), (t, i)
        if t in (3, 8, 13):  # one leaves
            together.free(slots.pop(order[0]))
        if t == 10:  # another goes on elsewhere
            moved = order[1]
            together.copy(slots[moved], 5)
            together.free(slots[moved])
            slots[moved] = 5


@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_they_follow_the_model(preset):
    model = build(preset)
    rows = make_rows(model, 5, 64, MOST)
    assert isinstance(rows, NativeRows)
    found = caches(model)
    for i, cache in enumerate(found):
        rows.load(i, export_state(cache))
    for t in range(20):
        ids = torch.tensor([tokens(t, i) for i in range(5)])
        logits = rows.run([Piece(i, [int(token)]) for i, token in enumerate(ids)])
        for i, cache in enumerate(found):
            expected = model(ids[i : i + 1, None], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[i], expected[0, 0], rtol=1e-4, atol=1e-4)


def read(rows, slot, text, cuts, company=()):
    """All logits of a text that is read in pieces, with other slots' tokens beside it."""
    rows.load(slot, None)
    found, at = [], 0
    for step, count in enumerate(cuts):
        others = [Piece(s, prompt(1 + (step + s) % 5, step), (step + s) % 2) for s in company]
        piece = Piece(slot, text[at : at + count], count)
        logits = rows.run([*others[:1], piece, *others[1:]])
        begin = sum(p.wanted for p in others[:1])
        found.append(logits[begin : begin + count].clone())
        at += count
    return torch.cat(found)


@pytest.mark.parametrize("preset", EXACT)
@torch.inference_mode()
def test_cuts_and_company_change_no_bit(preset):
    model, text = build(preset), prompt(61)
    rows = make_rows(model, 5, 1, MOST)
    assert rows.exact
    assert reads_exactly(model)
    expected = read(rows, 0, text, [1] * 61)
    state = rows.save(0)
    reference = model(torch.tensor([text])).logits[0]
    torch.testing.assert_close(expected, reference, rtol=1e-4, atol=1e-4)
    for slot in (3, 4):
        rows.load(slot, None)
    for slot, cuts in ((1, [16, 16, 16, 13]), (2, [3, 1, 16, 2, 9, 16, 5, 9])):
        company = (3, 4) if slot == 2 else ()
        assert torch.equal(read(rows, slot, text, cuts, company), expected)
        assert same(rows.save(slot), state)
    rows.load(1, state)  # and on from a state, or a copy
    rows.copy(2, 0)
    rows.free(2)
    after = rows.run([Piece(1, prompt(7, 1), 7)]).clone()
    assert torch.equal(rows.run([Piece(0, prompt(7, 1), 7)]), after)
    last = torch.cat([rows.run([Piece(4, [5], 0), Piece(3, [5, 6], 1)]), after[:0]])
    assert last.shape == (1, model.config.vocab_size)


@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.inference_mode()
def test_threads_and_many_slots_change_nothing(threads):
    """Wide layers, whose matrices and states are shared out over the threads."""
    model = build("gated_based", hidden_size=256, num_attention_heads=4)
    alone = make_rows(model, 1, 1, 40)
    expected = read(alone, 0, prompt(30), [1] * 30)
    torch.set_num_threads(threads)
    rows = make_rows(model, 33, 1, 40)
    for slot in range(33):
        rows.load(slot, None)
    for at in range(0, 30, 10):
        pieces = [Piece(slot, prompt(30)[at : at + 10], 10) for slot in range(33)]
        logits = rows.run(pieces).view(33, 10, -1)
        assert torch.equal(logits, expected[at : at + 10].expand(33, -1, -1))


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_quantised_models(bits, isa):
    model = quantize(build("based"), bits)
    rows = make_rows(model, 5, 1, MOST)
    expected = read(rows, 0, prompt(33), [1] * 33)
    for slot in (3, 4):
        rows.load(slot, None)
    assert torch.equal(read(rows, 1, prompt(33), [16, 3, 14], (3, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_weights_of_half_precision(dtype):
    model = build("based").to(dtype)
    rows = make_rows(model, 2, 1, MOST)
    expected = read(rows, 0, prompt(33), [1] * 33)
    assert torch.equal(read(rows, 1, prompt(33), [16, 3, 14]), expected)


@torch.inference_mode()
def test_numbers_that_are_not_finite_stay_in_their_sequence():
    model = build("gated_taylor")
    rows = make_rows(model, 3, 1, MOST)
    expected = read(rows, 0, prompt(20), [10, 10])
    rows.load(1, None)
    rows.run([Piece(1, [3])])
    broken = rows.save(1)
    broken.layers[0].sums.numerator.fill_(torch.nan)
    rows.load(1, broken)
    rows.load(0, None)
    first = rows.run([Piece(1, [3]), Piece(0, prompt(20)[:10], 10)])
    assert not first[0].isfinite().any()
    assert torch.equal(first[1:], expected[:10])


@torch.inference_mode()
def test_a_full_context_is_refused_and_windows_go_on():
    model = build("softmax")
    rows = make_rows(model, 2, 42, MOST)
    rows.load(0, export_state(caches(model)[3]))
    rows.run([Piece(0, [1])])
    rows.run([Piece(0, [1])])
    with pytest.raises(RuntimeError, match="no room"):
        rows.run([Piece(0, [1])])


@torch.inference_mode()
def test_wrong_pieces_are_refused():
    rows = make_rows(build(), 3, 1, MOST)
    for pieces in ([Piece(0, [1] * 17)], [Piece(0, [1]), Piece(0, [2])], [Piece(0, [])]):
        with pytest.raises(ValueError, match=r"slots|counts"):
            rows.run(pieces)


@torch.inference_mode()
def test_models_without_a_program_take_their_layers():
    model = build("taylor")
    model.model.layers[0].register_forward_hook(lambda *a: None)
    assert isinstance(make_rows(model, 2, 1, MOST), SeparateRows)
    assert isinstance(make_rows(build("taylor").double(), 2, 1, MOST), SeparateRows)
    assert not reads_exactly(model)


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_of_slots_and_of_a_cache(preset):
    model = build(preset)
    with torch.inference_mode():
        rows = make_rows(model, 3, 50, MOST)
    states = [*rows._rows._states, *rows._rows._next.values()]
    held = sum(s.numel() * s.element_size() for s in states)
    program = rows._rows._program
    run = (3 + MOST) * 4 * (program.width + program.output.size)
    assert rows_bytes(model, 3, 50, MOST) == held + run
    assert grows(model) == (preset == "softmax")
    assert rows.exact == (preset in EXACT)
    with torch.inference_mode():
        cache = caches(model)[3]
    assert cache_bytes(cache) == pytest.approx(cache_bytes_after(model, 40), rel=0.05)
