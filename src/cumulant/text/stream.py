"""Text as its tokens come: whole characters only, and the same text whether it comes from one run
or from several.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

# what decoders make of a character whose bytes are not all there, and of bytes that are none
UNFINISHED = "\ufffd"
KEPT = 16  # tokens before the next one: what it is decoded behind
MOST = 256  # tokens that are held back, or decoded at a time


class IncrementalDecoder:
    """Turns tokens into text, piece by piece: the pieces of all tokens, joined, are what decoding
    them at once gives behind what came before.

    A token can be part of a character, and what it stands for can depend on the token before it
    (WordPiece, Metaspace), so the last tokens are decoded together with it. `tokens` are those,
    `given` the characters of their text that were given out (or belong to a prompt). Both fit into
    a file, and a decoder made from it goes on as this one would.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, tokens: tuple[int, ...] = (), given: int = 0
    ):
        self.tokenizer, self.tokens, self.given = tokenizer, list(tokens), given

    def read_prompt(self, tokens: list[int]) -> None:
        """Tokens whose text is known already."""
        if tokens:
            self.tokens = [*self.tokens, *tokens][-MOST:]
            text = self._decode(self.tokens)
            self.given = len(text)
            self._forget(text)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self.tokens.append(token)
        text = self._decode(self.tokens)
        # a decoder may show every byte of an unfinished character by itself; bytes that never
        # become one must not wait for ever
        whole = (
            text.rstrip(UNFINISHED) if len(self.tokens) <= MOST else text.removesuffix(UNFINISHED)
        )
        new = whole[self.given :]
        self.given = max(self.given, len(whole))
        if new or len(self.tokens) > MOST:
            self._forget(text)
        return new

    def finish(self) -> str:
        """What is left, with a replacement character for bytes that make none."""
        text = self._decode(self.tokens)
        new, self.given = text[self.given :], max(self.given, len(text))
        return new

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _forget(self, text: str) -> None:
        """Keep the shortest tail, of `KEPT` tokens or more, that reads like the end of `text` by
        itself.
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

    If it cannot be printed, because a pipe was closed or a disk is full, `failure` says so and
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
        """Nothing: whether the text ends here, only the caller knows."""

    def close(self, *, goes_on: bool) -> None:
        """The end of the text, or with `goes_on` of this part: then what is unfinished is left to
        the next one, and no line ends."""
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
        """Characters that a terminal does not have are written as their numbers."""
        if self.failure is not None or sys.stdout is None:
            return
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        try:
            print(piece.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
        except OSError as error:
            self.failure = error
