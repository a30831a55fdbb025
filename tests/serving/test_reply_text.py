"""A reply's text ends before its stop texts, wherever tokens part it, in whole characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumulant.serving.text import ReplyText, TokenTexts
from cumulant.text.stream import IncrementalDecoder
from cumulant.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces(text, stop):
    reply, found = ReplyText(IncrementalDecoder(TOKENIZER), stop), []
    for byte in text.encode():
        found.append(reply.add(byte))
        if reply.stopped:
            return found, True
    return [*found, reply.finish()], reply.stopped


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab é€𝄞", max_size=30),
    st.lists(st.text(alphabet="ab é€", min_size=1, max_size=4), max_size=3),
)
def test_it_ends_before_the_first_stop(text, stop):
    found, stopped = pieces(text, tuple(stop))
    places = [text.find(s) for s in stop if s in text]
    assert stopped == bool(places)
    # what is complete first stops it: of several at once the one that begins first
    ends = {text[: text.find(s)] for s in stop if s in text} or {text}
    assert "".join(found) in ends
    first = min((text.find(s) + len(s) for s in stop if s in text), default=len(text))
    assert len("".join(found)) <= first
    assert not any("\ufffd" in piece for piece in found)


def test_text_is_not_held_longer_than_needed():
    reply = ReplyText(IncrementalDecoder(TOKENIZER), ("END",))
    out = [reply.add(byte) for byte in b"E EN ENx"]
    assert out == ["", "E ", "", "", "EN ", "", "", "ENx"]
    assert reply.finish() == ""
    held = ReplyText(IncrementalDecoder(TOKENIZER), ("END",))
    assert [held.add(byte) for byte in b"xEN"] == ["x", "", ""]
    assert held.finish() == "EN"


@pytest.mark.parametrize("token", [65, 0xE2, 256])
def test_texts_of_single_tokens(token):
    texts = TokenTexts(TOKENIZER)
    shown, raw = texts.text(token), texts.raw(token)
    expected = {
        65: ("A", [65]),
        0xE2: ("bytes:\\xe2", [0xE2]),
        256: ("<|endoftext|>", list(b"<|endoftext|>")),
    }
    assert (shown, raw) == expected[token]
