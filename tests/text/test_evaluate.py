"""Evaluation: bits per byte are the code length of the text, under the model that was kept."""

import math
from pathlib import Path

import pytest
import torch

from cumulant.text.checkpoint import load_checkpoint
from cumulant.text.evaluate import evaluate_whole, evaluate_windowed
from cumulant.text.tokens import read_tokens, tokenize

pytestmark = pytest.mark.filterwarnings("ignore")


def test_evaluation_is_the_code_length(run):
    """Bits per byte equal a token-by-token sum, for windows of any length."""
    model, tokenizer = load_checkpoint(run.output)
    documents = ["the cat sat on the mäuse;".encode(), b"the dog"]
    text = tokenize(documents, tokenizer)
    assert text.text_bytes == 26 + 7
    nats = 0.0
    for document in documents:
        ids = torch.tensor([[256, *document]])
        log_p = model(ids).logits.log_softmax(-1)[0, :-1]
        nats -= float(log_p.gather(1, ids[0, 1:, None]).sum())
    ids = torch.tensor([[256, *documents[0], 256, *documents[1]]])
    boundary = float(
        model(ids[:, :27]).logits.log_softmax(-1)[0, -1, 256]
    )  # the second text's start is predicted too
    whole = evaluate_whole(model, text, piece=5)
    assert whole.tokens == 34
    assert whole.bits_per_byte == pytest.approx((nats - boundary) / math.log(2) / 33, rel=1e-5)
    assert whole.loss == pytest.approx((nats - boundary) / 34, rel=1e-5)
    for context in (1, 7, 34, 100):
        nats = 0.0
        for a in range(0, 34, context):
            window = ids[:, a : a + context + 1]
            log_p = model(window).logits.log_softmax(-1)[0, :-1]
            nats -= float(log_p.gather(1, window[0, 1:, None]).sum())
        score = evaluate_windowed(model, text, context, batch_size=2)
        assert score.tokens == 34
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 33, rel=1e-5)
    with pytest.raises(ValueError, match="context: expected at least 1 token, got 0"):
        evaluate_windowed(model, text, 0)
    with pytest.raises(ValueError, match="batch: expected at least 1 window, got 0"):
        evaluate_windowed(model, text, 8, batch_size=0)


def test_the_score_reported_is_that_of_the_model_kept(run):
    model, _ = load_checkpoint(run.output)
    heldout = read_tokens(Path(run.output) / "tokens")[1]
    score = evaluate_windowed(model, heldout, 32)
    assert score.bits_per_byte == pytest.approx(run.score.bits_per_byte, rel=1e-4)
    assert score.text_bytes == run.score.text_bytes
