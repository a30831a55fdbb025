"""lm-eval's `local-completions` on a server gives the scores of the same model in process."""

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("fastapi")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from ..serving.common import build, byte_tokenizer
from ..serving.conftest import Running

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
PAIRS = [
    ("The cat sat on the", " mat"),
    ("Once upon a time there was", " a very old tree"),
    ("naïve", " 𝄞 café"),
    ("", "nothing before"),
]


def test_scores_are_those_of_the_model(tmp_path):
    model = build("taylor", vocab_size=257)
    folder = tmp_path / "small"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    inside = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    wanted = inside.loglikelihood(requests, disable_tqdm=True)
    server = Running({"small": model}, tokenizer=byte_tokenizer())
    try:
        outside = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions", model="small", tokenizer=str(folder),
            tokenizer_backend="huggingface", batch_size=1, max_length=1024,
        )  # fmt: skip
        found = outside.loglikelihood(requests, disable_tqdm=True)
    finally:
        server.close()
    for (a, greedy), (b, other) in zip(wanted, found, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
        assert greedy == other
