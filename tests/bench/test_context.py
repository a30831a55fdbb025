"""Loss by position and on repeated text, for models whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cumulant.bench.context import copying, loss_by_position
from cumulant.text.tokenizer import byte_tokenizer

VOCABULARY = 257


class Known(nn.Module):
    """Predicts the next token with a given probability at each place, where it is told what comes."""

    def __init__(self, probability):
        super().__init__()
        self.probability, self.device = probability, torch.device("cpu")

    def forward(self, input_ids, use_cache):
        following = torch.cat((input_ids[:, 1:], self.last(input_ids)), 1)
        p = torch.tensor([[self.probability(t, row) for t in range(len(row))] for row in input_ids])
        logits = ((1 - p) / (VOCABULARY - 1)).log()[..., None].repeat(1, 1, VOCABULARY)
        return SimpleNamespace(logits=logits.scatter(2, following[..., None], p.log()[..., None]))

    def last(self, input_ids):
        return (input_ids[:, -1:] + 1) % 256


@pytest.fixture
def text():
    """Bytes that count up, so that the next is known."""
    return SimpleNamespace(ids=np.arange(5000) % 256, text_bytes=5000)


def test_losses_stand_where_they_were_made(text):
    """A model that is right with probability 1/2 up to 32 tokens of context, 1/4 beyond."""
    model = Known(lambda t, _: 0.5 if t < 32 else 0.25)
    found = loss_by_position(model, text, 100, tokens=1000, batch=3)
    assert [(s.first, s.last) for s in found] == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert [s.nats for s in found] == pytest.approx([math.log(2), math.log(2), math.log(4), math.log(4)], rel=1e-5)
    assert sum(s.tokens for s in found) == 1000


def test_short_texts(text):
    assert loss_by_position(Known(lambda *_: 0.5), text, 4999)[-1].last == 4999
    with pytest.raises(ValueError, match="length: the text has 5,000 tokens"):
        loss_by_position(Known(lambda *_: 0.5), text, 5000)


def test_second_occurrences_are_told_from_first(text):
    """One that knows the second half of its window by heart: 1 bit a byte there, 8 before."""
    model = Known(lambda t, row: 0.5 if t >= len(row) - 40 else 2.0**-8)
    (found,) = copying(model, text, byte_tokenizer(), [64], span=20, samples=4)
    assert found.distance == 64
    assert found.first == pytest.approx(8, rel=0.01)
    assert found.second == pytest.approx(1, rel=0.01)
    with pytest.raises(ValueError, match="distance: the text has"):
        copying(model, text, byte_tokenizer(), [4000])
