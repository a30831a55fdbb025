"""Loss by context and on repeated text, for models whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cumulant.bench.compare.context import _draw_starts, loss_by_context, loss_on_copies
from cumulant.models import CumulantForCausalLM, from_preset
from cumulant.text.tokenizer import byte_tokenizer

VOCABULARY = 257


class Known(nn.Module):
    """A model that gives the next token a known probability at each position."""

    def __init__(self, probability):
        super().__init__()
        self.probability, self.device = probability, torch.device("cpu")

    def forward(self, input_ids, past_key_values, use_cache):
        following = torch.cat((input_ids[:, 1:], self.last(input_ids)), 1)
        p = torch.tensor([[self.probability(t, row) for t in range(len(row))] for row in input_ids])
        logits = ((1 - p) / (VOCABULARY - 1)).log()[..., None].repeat(1, 1, VOCABULARY)
        logits = logits.scatter(2, following[..., None], p.log()[..., None])
        return SimpleNamespace(logits=logits, past_key_values=None)

    def last(self, input_ids):
        return (input_ids[:, -1:] + 1) % 256


@pytest.fixture
def text():
    """Bytes that count up, so that the next is known."""
    return SimpleNamespace(ids=np.arange(5000) % 256, text_bytes=5000)


def test_losses_stand_where_they_were_made(text):
    """A model that is right with probability 1/2 up to 64 tokens of context, 1/4 beyond."""
    model = Known(lambda t, _: 0.5 if t < 64 else 0.25)
    found = loss_by_context(model, text, byte_tokenizer(), 256, tokens=1000, batch_tokens=300)
    assert [(s.first, s.last) for s in found] == [(16, 32), (32, 64), (64, 128), (128, 256)]
    assert [s.bits for s in found] == pytest.approx([1, 1, 2, 2], rel=1e-5)
    assert [s.tokens for s in found] == [896] * 4  # seven halves of the longest window


def test_all_lengths_score_the_same_tokens(text):
    """A model without context gains nothing by length, though it is right on some tokens alone."""
    model = Known(lambda t, row: 0.5 if int(row[t]) < 100 else 0.01)
    found = loss_by_context(model, text, byte_tokenizer(), 480, tokens=10_000)
    assert [s.last for s in found] == [60, 120, 240, 480]
    assert [s.bits for s in found] == pytest.approx([found[0].bits] * 4, rel=1e-6)
    assert {s.tokens for s in found} == {19 * 240}


def test_bytes_are_those_of_the_tokens_scored(text):
    """Tokens before the first scored one, here without bytes, do not count."""
    text.ids[:241] = 256
    found = loss_by_context(Known(lambda *_: 0.5), text, byte_tokenizer(), 480)
    assert [s.bits for s in found] == pytest.approx([1] * 4, rel=1e-5)


def test_nothing_else_in_a_window_has_a_part_of_the_span():
    places = _draw_starts(60, 4, 11, 500)
    for span, other, between in places:
        own = {*range(span, span + 4)}
        assert not own & {*range(other, other + 4)}
        assert not own & {*range(between, between + 11)}
    for i, last in enumerate((56, 56, 49)):  # anywhere in the text
        assert {min(p[i] for p in places), max(p[i] for p in places)} == {0, last}


@pytest.mark.parametrize("preset", ["softmax", "linear", "taylor", "based", "flash"])
def test_pieces_give_the_losses_of_the_whole(preset, text):
    """Long windows are read in pieces, the last one shorter, and states are carried."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2}
    config = from_preset(preset, num_hidden_layers=3, initializer_range=0.5, **sizes)
    model = CumulantForCausalLM(config).double()
    read = []
    model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    text.ids = np.random.default_rng(0).permutation(5000) % 256
    options = {"tokens": 1000, "batch_tokens": 512}
    whole = loss_by_context(model, text, byte_tokenizer(), 640, **options, piece=640)
    read.clear()
    pieces = loss_by_context(model, text, byte_tokenizer(), 640, **options, piece=96)
    assert max(length for _, length in read) == 96
    assert [s.bits for s in pieces] == pytest.approx([s.bits for s in whole], rel=1e-6)
    assert len({round(s.bits, 4) for s in whole}) > 1  # they depend on the window


def test_short_texts(text):
    assert loss_by_context(Known(lambda *_: 0.5), text, byte_tokenizer(), 4998)[-1].last == 4998
    for length in (5000, 1):
        with pytest.raises(ValueError, match="length: the text has 5,000 tokens"):
            loss_by_context(Known(lambda *_: 0.5), text, byte_tokenizer(), length)


def test_copies_are_told_from_what_a_long_context_is_worth(text):
    """A model that repeats a window by its first token: 1 bit a byte there, and 8 elsewhere."""
    model = Known(lambda t, row: 0.5 if t >= len(row) - 19 and row[0] == row[-19] else 2.0**-8)
    near, far = loss_on_copies(model, text, byte_tokenizer(), [64, 200], span=20, samples=4)
    assert (near.distance, far.distance) == (64, 200)
    for found in (near, far):
        assert found.span == 20
        assert found.second == pytest.approx(1, rel=0.01)
        assert found.control == pytest.approx(8, rel=0.01)
    with pytest.raises(ValueError, match="distance: the text has"):
        loss_on_copies(model, text, byte_tokenizer(), [4000])


def test_spans_are_the_same_at_all_distances(text):
    """Cut out of the windows that the model is given."""
    seen = []
    model = Known(lambda *_: 0.5)
    model.last = lambda ids: seen.extend(ids) or (ids[:, -1:] + 1) % 256
    text.ids = np.random.default_rng(0).permutation(5000) % 256
    loss_on_copies(model, text, byte_tokenizer(), [64, 200], span=20, samples=4)
    near, far = ([*zip(seen[at : at + 4], seen[at + 4 : at + 8], strict=True)] for at in (0, 8))
    for (second, control), (later, _) in zip(near, far, strict=True):
        assert (len(second), len(later)) == (20 + 64 + 19, 20 + 200 + 19)
        assert torch.equal(second[-19:], later[-19:])
        assert torch.equal(second[20:], control[20:])
        assert torch.equal(second[:19], second[-19:])
        assert not torch.equal(second[:20], control[:20])
