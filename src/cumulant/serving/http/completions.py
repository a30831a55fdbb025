"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..requests import Read, Request, Update
from .errors import ApiError, Json, as_api_error
from .replies import CompletionScores, Usage, as_events, chat_scores, while_connected
from .schema import ChatBody, CompletionBody, Generation
from .service import Served, Service, client_of
from .states import find_state

log = logging.getLogger("cumulant.serving")
CHAT_TOKENS = 1024  # of an answer, if the request does not say


@dataclass
class _Choice:
    """What has come of one reply."""

    text: str = ""
    finish_reason: str | None = None
    scores: list[Any] = field(default_factory=list)


class _Completion:
    """One request's answer, in either form. kind: its `object`."""

    kind = "text_completion"

    def __init__(self, service: Service, served: Served, body: Generation):
        self.service, self.served, self.body = service, served, body
        self.id = (
            f"{'cmpl' if self.kind == 'text_completion' else 'chatcmpl'}-{secrets.token_hex(12)}"
        )
        self.created, self.usage = int(time.time()), Usage()
        self.replies = 1 if body.n is None else body.n
        if not 1 <= self.replies <= served.engine.slots:
            most = served.engine.slots
            raise ApiError(400, f"n: expected 1 to {most} (the slots), got {self.replies}", "n")
        self.requests: list[Request] = []
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else None
        # of every part of a stream, which would take longer to write each time
        self._beginning = json.dumps(self.head(kind))[:-1]
        self._end = ', "usage": null}' if self._has_usage else "}"

    def head(self, kind: str | None = None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind or self.kind,
            "created": self.created,
            "model": self.served.name,
        }

    def number(self, prompt: int, index: int) -> int:
        """A reply's place among the choices."""
        return prompt * self.replies + index

    def choices(self, prompt: int, event: Any) -> Iterator[dict[str, Any]]:
        """The parts of a stream that an event gives."""
        raise NotImplementedError

    def whole(self, number: int, choice: _Choice) -> dict[str, Any]:
        """A complete choice."""
        raise NotImplementedError

    @property
    def _has_usage(self) -> bool:
        return bool(self.body.stream_options and self.body.stream_options.include_usage)

    def chunks(self, prompt: int, event: Any) -> list[str]:
        self.usage.note(prompt, event)
        return [
            f'{self._beginning}, "choices": [{json.dumps(choice)}]{self._end}'
            for choice in self.choices(prompt, event)
        ]

    def ending(self) -> list[str]:
        if not self._has_usage:
            return []
        return [f'{self._beginning}, "choices": [], "usage": {json.dumps(self.usage.as_dict())}}}']

    def failure(self, error: BaseException) -> str:
        answer = as_api_error(error)
        if answer.status == 500:
            log.error("request %s failed", self.id, exc_info=error)
        return json.dumps(answer.body())

    async def collect(self, answers: Any) -> dict[str, Any]:
        """The complete answer."""
        found = {self.number(p, i): _Choice() for p in range(len(self.requests))
                 for i in range(self.replies)}  # fmt: skip
        async with answers:
            async for tagged in answers.events():
                assert tagged is not None  # nothing ticks
                number, event = tagged
                self.usage.note(number, event)
                self.gather(number, event, found)
        choices = [self.whole(number, choice) for number, choice in found.items()]
        return self.head() | {"choices": choices, "usage": self.usage.as_dict()}

    def gather(self, prompt: int, event: Any, found: dict[int, _Choice]) -> None:
        if isinstance(event, Update):
            choice = found[self.number(prompt, event.index)]
            choice.text += event.text
            choice.finish_reason = event.finish_reason
            choice.scores += event.scores

    async def answer(self, http: HttpRequest) -> Any:
        """The answer to send: a stream or an object."""
        self.usage.prompt = sum(len(r.tokens) for r in self.requests)
        answers = self.service.answers(self.served, self.requests)
        limits = self.service.limits
        if self.body.stream:
            events = as_events(
                answers, self.chunks, self.ending, self.failure,
                ping=limits.ping, timeout=limits.timeout,
            )  # fmt: skip
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            return Json(await while_connected(http, self.collect(answers), limits.timeout))
        finally:
            answers.cancel()


class TextCompletion(_Completion):
    """An answer to /v1/completions."""

    body: CompletionBody

    def __init__(self, service: Service, served: Served, body: CompletionBody, client: str):
        super().__init__(service, served, body)
        body.check_scores("logprobs", body.logprobs)
        sampling = body.sampling(service.limits.max_tokens, 16)
        state = find_state(served, body.state_id)
        if state is not None and body.echo:
            raise ApiError(400, "echo: cannot be used with state_id", "echo")
        scored = body.logprobs if body.echo else None
        self.prompts: list[str] = []
        self.scores: dict[int, CompletionScores] = {}
        for prompt in body.prompts():
            ids = served.encode(prompt) if isinstance(prompt, str) else prompt
            if not ids and state is None:
                ids = [int(served.tokenizer.eos_token_id)]
            served.check_tokens(ids)
            tokens = (*(state.tokens if state else ()), *ids)
            shown = ""
            if body.echo:
                shown = prompt if isinstance(prompt, str) else served.decode(ids)
            for i in range(self.replies):
                number = self.number(len(self.prompts), i)
                scores = CompletionScores(served, body.logprobs)
                if not body.echo:
                    scores.skip(list(tokens[-256:]))
                self.scores[number] = scores
            self.prompts.append(shown)
            self.requests.append(
                Request(
                    tokens,
                    sampling,
                    self.replies,
                    body.logprobs,
                    scored,
                    start=state.start(more=bool(ids)) if state else None,
                    client=client,
                )
            )

    def gather(self, prompt: int, event: Any, found: dict[int, _Choice]) -> None:
        if isinstance(event, Read):
            for i in range(self.replies):
                choice = found[self.number(prompt, i)]
                choice.text = self.prompts[prompt]
                choice.scores += event.scores or []
                choice.finish_reason = "length"  # of no tokens at all
        super().gather(prompt, event, found)

    def choices(self, prompt: int, event: Any) -> Iterator[dict[str, Any]]:
        if isinstance(event, Update):
            number = self.number(prompt, event.index)
            if event.text or event.scores or event.finish_reason:
                yield self._part(number, event.text, event.scores, event.finish_reason)
        elif isinstance(event, Read):
            none = event and self.requests[prompt].sampling.max_tokens == 0
            if self.body.echo or none:
                for i in range(self.replies):
                    yield self._part(
                        self.number(prompt, i),
                        self.prompts[prompt],
                        event.scores or [],
                        "length" if none else None,
                    )

    def whole(self, number: int, choice: _Choice) -> dict[str, Any]:
        return self._part(number, choice.text, choice.scores, choice.finish_reason)

    def _part(
        self, number: int, text: str, scores: list[Any], reason: str | None
    ) -> dict[str, Any]:
        listed = self.scores[number].of(scores)
        return {"index": number, "text": text, "logprobs": listed, "finish_reason": reason}


class ChatCompletion(_Completion):
    """An answer to /v1/chat/completions."""

    kind = "chat.completion"
    body: ChatBody

    def __init__(self, service: Service, served: Served, body: ChatBody, client: str):
        super().__init__(service, served, body)
        body.check_scores("top_logprobs", body.top_logprobs)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs=true", "top_logprobs")
        state = find_state(served, body.state_id)
        ids, borders = served.encode_chat([m.plain() for m in body.messages])
        begin = [] if state is None else state.tokens
        tokens = (*begin, *ids)
        most = service.limits.max_tokens
        room = served.engine.room
        default = min(most, CHAT_TOKENS if room is None else max(1, room - len(tokens)))
        self.requests.append(
            Request(
                tokens,
                body.sampling(most, default),
                self.replies,
                (body.top_logprobs or 0) if body.logprobs else None,
                borders=tuple(len(begin) + at for at in borders),
                start=None if state is None else state.start(more=True),
                client=client,
                ends=served.chat_ends,
            )
        )

    def choices(self, prompt: int, event: Any) -> Iterator[dict[str, Any]]:
        if isinstance(event, Read):
            for i in range(self.replies):
                yield self._part(i, {"role": "assistant", "content": ""}, None, None)
        elif isinstance(event, Update):
            if event.text or event.scores:
                scores = event.scores if self.body.logprobs else None
                yield self._part(event.index, {"content": event.text}, scores, None)
            if event.finish_reason:
                yield self._part(event.index, {}, None, event.finish_reason)

    def _part(
        self, index: int, delta: dict[str, str], scores: list[Any] | None, reason: str | None
    ) -> dict[str, Any]:
        listed = chat_scores(self.served, scores)
        return {"index": index, "delta": delta, "logprobs": listed, "finish_reason": reason}

    def whole(self, number: int, choice: _Choice) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_scores(self.served, choice.scores if self.body.logprobs else None),
            "finish_reason": choice.finish_reason or "length",
        }


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def complete(body: CompletionBody, http: HttpRequest) -> Any:
        served = service.model(body.model)
        client = client_of(http)
        found = await run_in_threadpool(TextCompletion, service, served, body, client)
        return await found.answer(http)

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Any:
        served = service.model(body.model)
        client = client_of(http)
        found = await run_in_threadpool(ChatCompletion, service, served, body, client)
        return await found.answer(http)

    return routes
