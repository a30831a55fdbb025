"""Text from tokens as they come: whole characters only, the same from one run or several."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

# decoders write it for an incomplete character, and for bytes that form none
UNFINISHED = "\ufffd"
KEPT = 16  # tokens decoded together with the next one, at least
MOST = 256  # tokens decoded at a time


class IncrementalDecoder:
    """Decodes tokens one by one; the joined texts equal the text of decoding all at once.

    A token can be part of a character, and its text can depend on the token before it (WordPiece,
    Metaspace), so the last tokens are decoded together with it. `tokens` are those tokens, and
    `given` counts the characters of their text that were returned or belong to a prompt. Both fit
    into a file, and a decoder made from them continues as this one would.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, tokens: tuple[int, ...] = (), given: int = 0
    ):
        self.tokenizer, self.tokens, self.given = tokenizer, list(tokens), given

    def read_prompt(self, tokens: list[int]) -> None:
        """Read tokens whose text is already known."""
        if tokens:
            self.tokens = [*self.tokens, *tokens][-MOST:]
            text = self._decode(self.tokens)
            self.given = len(text)
            self._drop_tokens(text)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self.tokens.append(token)
        text = self._decode(self.tokens)
        # a decoder may write a mark for every byte of an unfinished character; bytes that never
        # form one must not wait for ever
        whole = (
            text.rstrip(UNFINISHED) if len(self.tokens) <= MOST else text.removesuffix(UNFINISHED)
        )
        new = whole[self.given :]
        self.given = max(self.given, len(whole))
        if new or len(self.tokens) > MOST:
            self._drop_tokens(text)
        return new

    def finish(self) -> str:
        """The text that is left, with a replacement character for bytes that form none."""
        text = self._decode(self.tokens)
        new, self.given = text[self.given :], max(self.given, len(text))
        return new

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _drop_tokens(self, text: str) -> None:
        """Drop old tokens that no longer affect the text.

        The tail that stays is the shortest one, of `KEPT` tokens or more, whose own text ends
        `text`.
        """
        if len(self.tokens) < 2 * KEPT:
            return
        for first in range(len(self.tokens) - KEPT, 0, -1):
            tail = self._decode(self.tokens[first:])
            if text.endswith(tail) and len(tail) >= len(text) - self.given:
                self.given -= len(text) - len(tail)
                del self.tokens[:first]
                return


class Output(BaseStreamer):  # type: ignore[misc]
    """Collects the text that a model generates and, with `stream`, prints it as it comes.

    If printing fails, because a pipe was closed or a disk is full, `failure` holds the error and
    nothing more is printed.
    """

    def __init__(self, decoder: IncrementalDecoder, *, stream: bool):
        self.decoder, self.stream = decoder, stream
        self.pieces: list[str] = []
        self.failure: OSError | None = None
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:  # transformers hands over the prompt first
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._write(self.decoder.add(token))

    def end(self) -> None:
        """Do nothing: only the caller knows whether the text ends here."""

    def close(self, *, goes_on: bool) -> None:
        """End the text; with `goes_on`, end only this run's share of it.

        Then an unfinished character is left to the next run, and no line ends.
        """
        if not goes_on:
            self._write(self.decoder.finish())
        if self.stream and (not goes_on or (sys.stdout is not None and sys.stdout.isatty())):
            self._print("\n")

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def _write(self, piece: str) -> None:
        self.pieces.append(piece)
        if self.stream:
            self._print(piece)

    def _print(self, piece: str) -> None:
        """Print; characters that a terminal does not have appear as their numbers."""
        if self.failure is not None or sys.stdout is None:
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        try:
            print(piece.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
        except OSError as error:
            self.failure = error
