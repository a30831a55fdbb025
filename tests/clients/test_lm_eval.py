"""lm-eval gives the figures of `cumulant evaluate`, over documents and windows, from a path too."""

import math

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from cumulant.text.evaluate import evaluate_whole  # noqa: E402
from cumulant.text.tokens import tokenize  # noqa: E402

from .common import KINDS, TOKENIZER, build  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
TEXTS = ["The quick brown fox jumps over the lazy dog.", "naïve café, 東京", "x" * 300]


def requests(kind, rows):
    return [Instance(request_type=kind, doc={}, arguments=row, idx=i) for i, row in enumerate(rows)]


def harness(model, **more):
    return HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=2, device="cpu", **more)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_documents(kind):
    """Scores agree to 1e-8: no window is cut, and padding in a batch changes nothing."""
    model = build(kind).double()
    client = harness(model)
    assert client.max_length == 2**20
    found = client.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    )
    for text, nats in zip(TEXTS, found):
        score = evaluate_whole(model, tokenize([text.encode()], TOKENIZER))
        assert -nats / math.log(2) / len(text.encode()) == pytest.approx(
            score.bits_per_byte, rel=1e-8
        )


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_answers(kind):
    """A padded batch scores each continuation as alone, and generation stops at a string."""
    model = build(kind).double()
    client = harness(model)
    rows = [("ab", " cd"), ("a longer context", "!"), ("", "x")]
    found = [nats for nats, _ in client.loglikelihood(requests("loglikelihood", rows))]
    for (context, rest), nats in zip(rows, found):
        ids = TOKENIZER(context)["input_ids"] or [256]
        more = TOKENIZER(rest)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([ids + more])).logits[0].log_softmax(-1)
        expected = sum(logp[len(ids) + i - 1, token].item() for i, token in enumerate(more))
        assert nats == pytest.approx(expected, rel=1e-6)
    options = {"until": ["e", "\n"], "max_gen_toks": 8, "do_sample": False}
    texts = client.generate_until(
        requests("generate_until", [("ab", dict(options)), ("abcd", dict(options))])
    )
    assert all("e" not in text and "\n" not in text for text in texts)


def test_from_a_path(tmp_path):
    model = build("taylor")
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    client = HFLM(pretrained=str(tmp_path), trust_remote_code=True, batch_size=1, device="cpu")
    row = requests("loglikelihood", [("ab", "cd")])
    assert client.loglikelihood(row)[0][0] == pytest.approx(
        harness(model).loglikelihood(row)[0][0], rel=1e-5
    )
