"""Replies as they grow, and their log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest

from ...text.stream import IncrementalDecoder
from ..reading import TokenScores
from ..requests import Read, Update
from .bridge import Answers
from .errors import ApiError
from .service import Served


@dataclass
class Usage:
    """Tokens of a request, as OpenAI's API counts them."""

    prompt: int = 0
    cached: int = 0
    replies: dict[tuple[int, int], int] = field(default_factory=dict)

    def note(self, number: int, event: Any) -> None:
        if isinstance(event, Read):
            self.cached += event.cached_tokens
        elif isinstance(event, Update):
            self.replies[number, event.index] = event.tokens

    def as_dict(self) -> dict[str, Any]:
        drawn = sum(self.replies.values())
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": drawn,
            "total_tokens": self.prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class CompletionScores:
    """The `logprobs` of a completion: lists of tokens, with their offsets in the text."""

    def __init__(self, served: Served, top: int | None, start: int = 0):
        self._served, self._top = served, top
        self._decoder, self._offset = IncrementalDecoder(served.tokenizer), start

    def skip(self, tokens: list[int]) -> None:
        """Read tokens that are before the text."""
        self._decoder.read_prompt(tokens)

    def of(self, scores: list[TokenScores]) -> dict[str, Any] | None:
        """The lists of the next tokens; each has the offset where it begins."""
        if self._top is None:
            return None
        texts = self._served.texts
        out: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for s in scores:
            name = texts.text(s.token)
            out["tokens"].append(name)
            out["token_logprobs"].append(s.log_probability)
            top = {texts.text(token): x for token, x in reversed(s.top)}
            if s.log_probability is None:
                out["top_logprobs"].append(None)
            else:
                out["top_logprobs"].append(top | {name: s.log_probability})
            out["text_offset"].append(self._offset)
            self._offset += len(self._decoder.add(s.token))
        return out


def chat_scores(served: Served, scores: list[TokenScores] | None) -> dict[str, Any] | None:
    """The `logprobs` of a chat's answer."""
    if scores is None:
        return None

    def entry(token: int, value: float | None) -> dict[str, Any]:
        texts = served.texts
        return {"token": texts.text(token), "logprob": value, "bytes": texts.raw(token)}

    return {
        "content": [
            entry(s.token, s.log_probability) | {"top_logprobs": [entry(*t) for t in s.top]}
            for s in scores
        ],
        "refusal": None,
    }


async def while_connected(http: HttpRequest, work: Awaitable[Any], timeout: float) -> Any:
    """The result of `work`, which is cancelled when the client goes or after `timeout` seconds."""

    async def wait_for_end() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError(499, "the client has gone")
        raise ApiError(504, f"no complete answer within {timeout:g} seconds", code="timeout")
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def as_events(
    answers: Answers,
    chunks: Callable[[int, Any], list[str]],
    ending: Callable[[], list[str]],
    failure: Callable[[BaseException], str],
    *,
    ping: float,
    timeout: float,
) -> AsyncIterator[str]:
    """Server-sent events of a stream, which ends in [DONE].

    After each `ping` seconds there is a comment. An error is an event.
    """
    deadline = time.monotonic() + timeout
    async with answers:
        try:
            async for tagged in answers.events(tick=ping):
                if tagged is not None:
                    for chunk in chunks(*tagged):
                        yield f"data: {chunk}\n\n"
                elif time.monotonic() > deadline:
                    raise ApiError(504, f"no complete answer within {timeout:g} seconds")
                else:
                    yield ": ping\n\n"
            for chunk in ending():
                yield f"data: {chunk}\n\n"
        except Exception as error:
            yield f"data: {failure(error)}\n\n"
    yield "data: [DONE]\n\n"
