"""The text of a comparison: too little is refused, and no more is scored than was asked."""

from dataclasses import replace

import pytest

from cumulant.bench.compare import work as bench
from cumulant.text.tokens import read_tokens

from .comparisons import Enough, enough, rows, run

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_mistake_in_the_text_can_be_mended(recipe, tmp_path, monkeypatch):
    """Too short a text is refused before training, and the folder can be used again."""
    monkeypatch.setattr(bench, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(
        ValueError, match=r"data: .* tokens are not one step of 4 x 32; pass more text"
    ):
        run(replace(recipe, epochs=0.001), tmp_path / "new")

    monkeypatch.setattr(bench, "measure_costs", enough)
    with pytest.raises(Enough):
        run(recipe, tmp_path / "new")
    (text,) = rows(tmp_path / "new", "text")
    assert text["steps"] > 1


def test_no_more_of_the_heldout_text_is_scored_than_asked(recipe, tmp_path, monkeypatch):
    """Its beginning, in tokens and bytes that belong together."""
    monkeypatch.setattr(bench, "measure_costs", enough)
    with pytest.raises(Enough):
        run(recipe, tmp_path / "new", scored=100)
    (text,) = rows(tmp_path / "new", "text")
    assert text["heldout_tokens"] == 100
    ids = read_tokens(tmp_path / "new" / "text")[1].ids[:101]
    tokenizer = bench.load_tokenizer(tmp_path / "new" / "text")
    assert text["heldout_bytes"] == len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    seen = []
    monkeypatch.setattr(
        bench, "train", lambda options, text, say: seen.append(text.heldout) or enough()
    )
    monkeypatch.setattr(bench, "measure_costs", lambda configs, **_: {})
    with pytest.raises(Enough):
        run(recipe, tmp_path / "new")  # as it was begun
    assert len(seen[0].ids) == 101
    assert seen[0].text_bytes == text["heldout_bytes"]
    assert list(seen[0].starts) == [0]
