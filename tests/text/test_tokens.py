"""Token files: what they say of the text."""

import pytest
from tokenizers import Tokenizer, models, normalizers

from cumulant.text.corpus import load_corpus
from cumulant.text.evaluate import Score
from cumulant.text.tokenizer import byte_tokenizer, load_tokenizer
from cumulant.text.tokens import read_tokens, write_tokens


def test_what_a_tokenizer_loses_is_kept_and_said(tmp_path):
    tokenizer = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.model = models.BPE(vocab={**tokenizer.get_vocab(), "ab": 300}, merges=[("a", "b")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("ABcd" * 4000)
    write_tokens(tmp_path / "t", load_corpus(str(tmp_path / "a.txt")), load_tokenizer(tmp_path))
    lost = read_tokens(tmp_path / "t")[1].lost
    assert lost == pytest.approx(0.5, abs=0.01)
    score = Score(1.0, 1.0, 1, 1, lost)
    assert score.as_dict()["lost"] == lost
    assert score.note.startswith("the tokenizer does not keep the text: 50% of its bytes differ")
    assert not Score(1.0, 1.0, 1, 1).note


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"bytes": 3}', '{"bytes": {"train": "x", "heldout": 1}}'])
def test_broken_notes_of_tokens(content, tmp_path):
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(ValueError, match="tokens: .*tokens.json is damaged"):
        read_tokens(tmp_path)
