"""Tokens are drawn as transformers draws them, and by the seed alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cumulant.serving.sampling import Sampler, SamplingOptions, log_probabilities

LOGITS = np.random.default_rng(0).normal(size=60).astype(np.float32) * 3
LARGE = np.random.default_rng(1).normal(size=9000).astype(np.float32) * 2


def drawn(options, logits=LOGITS, count=4000):
    sampler = Sampler(options)
    return np.bincount([sampler.draw(logits) for _ in range(count)], minlength=len(logits))


def expected(logits, *warpers):
    scores = torch.tensor(logits)[None]
    for warper in warpers:
        scores = warper(torch.tensor([[0]]), scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.5}, [lambda ids, x: x / 0.5]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_k": 8, "top_p": 0.8}, [TopKLogitsWarper(8), TopPLogitsWarper(0.8)]),
        (
            {"temperature": 2.0, "top_p": 0.6},
            [lambda ids, x: x / 2, TopPLogitsWarper(0.6)],
        ),
    ],
)
@pytest.mark.parametrize("logits", [LOGITS, LARGE], ids=["small", "large"])
def test_frequencies_are_those_of_transformers(options, warpers, logits):
    wanted, count = expected(logits, *warpers), 4000
    found = drawn(SamplingOptions(seed=1, **options), logits, count)
    assert not found[wanted == 0].any()
    # a sum of squares over expected counts, whose mean is the number of tokens
    mask = wanted > 0
    chi = ((found - count * wanted)[mask] ** 2 / (count * wanted)[mask]).sum()
    freedom = mask.sum() - 1
    assert chi < freedom + 6 * np.sqrt(2 * max(freedom, 1)) * (1 if freedom < 1000 else 4)


def test_the_first_draws_of_a_seed():
    """They must not change from version to version."""
    sampler = Sampler(SamplingOptions(seed=7))
    first = [sampler.draw(LOGITS) for _ in range(8)]
    again = Sampler(SamplingOptions(seed=7))
    assert [again.draw(LOGITS) for _ in range(8)] == first
    other = Sampler(SamplingOptions(seed=7), index=1)
    assert [other.draw(LOGITS) for _ in range(8)] != first
    unseeded = [Sampler(SamplingOptions()).draw(LARGE * 0) for _ in range(5)]
    assert len(set(unseeded)) > 1


def test_greedy_and_biases():
    greedy = SamplingOptions(temperature=0)
    best = int(LOGITS.argmax())
    assert Sampler(greedy).is_plain
    assert Sampler(greedy).draw(LOGITS) == best
    barred = Sampler(greedy, barred=np.array([best]))
    assert not barred.is_plain
    assert barred.draw(LOGITS) != best
    assert Sampler(SamplingOptions(temperature=0, logit_bias={3: 100.0})).draw(LOGITS) == 3
    never = SamplingOptions(seed=0, logit_bias=dict.fromkeys(range(1, 60), -100.0))
    assert not drawn(never, count=50)[1:].any()
    assert np.array_equal(LOGITS, np.random.default_rng(0).normal(size=60).astype("f4") * 3)


def test_penalties():
    options = SamplingOptions(temperature=0, frequency_penalty=0.5, presence_penalty=1.0)
    sampler, x = Sampler(options), LOGITS.copy()
    for _ in range(30):
        token = int(x.argmax())
        assert sampler.draw(LOGITS) == token
        x[token] -= 0.5 + (1.0 if x[token] == LOGITS[token] else 0)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    sampler = Sampler(SamplingOptions(temperature=0, repetition_penalty=1.7), prompt=[3, 3, 9])
    ids = [3, 3, 9]
    for _ in range(30):
        scores = processor(torch.tensor([ids]), torch.tensor(LOGITS)[None])
        assert sampler.draw(LOGITS) == int(scores.argmax())
        ids.append(int(scores.argmax()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 1), st.sampled_from([10, 5000]), st.booleans())
def test_top_p_keeps_what_transformers_keeps(seed, p, size, ties):
    rng = np.random.default_rng(seed)
    x = (rng.integers(0, 4, size) if ties else rng.normal(size=size) * 3).astype(np.float32)
    kept = np.flatnonzero(expected(x, TopPLogitsWarper(p)) > 0)
    from cumulant.serving.sampling import _likeliest

    own = _likeliest(np.exp((x - x.max()).astype(np.float64)), p)
    # which of equal tokens are kept is free, and a sum beside p may round to either side
    assert abs(len(own) - len(kept)) <= 1
    assert np.allclose(np.sort(x[own])[::-1][: len(kept)], np.sort(x[kept])[::-1][: len(own)])


def test_log_probabilities():
    found = log_probabilities(LARGE)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, torch.tensor(LARGE).double().log_softmax(-1), atol=1e-12)
    shifted = log_probabilities(np.array([[1e4, -1e4]], dtype="f4"))
    np.testing.assert_allclose(shifted, [[0, -2e4]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-9),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("presence_penalty", 3.0),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("max_tokens", -1),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
    ],
)
def test_bad_options(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        SamplingOptions(**{name: value})
