"""A reply's text as it grows, and the texts of single tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..text.stream import UNFINISHED, IncrementalDecoder


def ending_tokens(model: Any, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
    return frozenset(int(i) for i in ends if i is not None)


class ReplyText:
    """Text from tokens, which ends before the first of the texts `stop`.

    Characters come whole, and text that could begin one of `stop` is held back until that is clear.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: tuple[str, ...] = ()):
        self._decoder, self._stop = decoder, stop
        self._held = ""
        self.stopped = False

    @property
    def holds(self) -> bool:
        """Whether some text is held back."""
        return bool(self._held)

    def add(self, token: int) -> str:
        """The text that is certain after `token`; `stopped` tells that one of `stop` is there."""
        return self._release(self._decoder.add(token))

    def finish(self) -> str:
        """The rest of the text, once there are no more tokens."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        if not self._stop or self.stopped:
            return text
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        kept = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` are the first ones of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class TokenTexts:
    """The text and the bytes of single tokens, for lists of log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer: Any = tokenizer
        self._decode = lru_cache(65536)(self._decode_token)

    def text(self, token: int) -> str:
        """The token's text; of a part of a character its bytes, as ``bytes:\\xe2``."""
        return self._decode(token)[0]

    def raw(self, token: int) -> list[int] | None:
        """The token's bytes of UTF-8, or None if the tokenizer does not tell."""
        found = self._decode(token)[1]
        return None if found is None else list(found)

    def _decode_token(self, token: int) -> tuple[str, bytes | None]:
        text: str = self._tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
        if UNFINISHED not in text:
            return text, text.encode()
        name = self._tokenizer.convert_ids_to_tokens(token)
        raw = _bytes_of(name or "")
        if raw is None:
            return f"token:{token}", None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


@lru_cache(1)
def _bytes_by_character() -> dict[str, int]:
    """The bytes that characters stand for in byte-level vocabularies."""
    from ..text.tokenizer import byte_characters

    return {character: byte for byte, character in byte_characters().items()}


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token of a byte-level vocabulary, or of a byte fallback such as ``<0xE2>``."""
    if len(name) == 6 and name.startswith("<0x"):
        return bytes.fromhex(name[3:5])
    known = _bytes_by_character()
    return bytes(known[c] for c in name) if name and all(c in known for c in name) else None
