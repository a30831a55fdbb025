"""What a server serves: its models, and its limits."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from transformers import PreTrainedTokenizerFast

from ...models.rows import cache_bytes_after
from ...text.chat import end_of_turn, holds_control_token, render_messages
from ...text.tokenizer import encode
from ..engine import Engine
from ..library import StateLibrary
from ..text import TokenTexts
from .bridge import Answers, Bridge
from .errors import ApiError


@dataclass
class Limits:
    """What a request may ask for.

    keys: those that may ask; none: all may. timeout: seconds until an answer must be complete.
    """

    keys: tuple[str, ...] = ()
    body_bytes: int = 16 * 2**20
    upload_bytes: int = 2**30
    prompt_tokens: int = 2**20
    max_tokens: int = 4096
    timeout: float = 3600.0
    ping: float = 15.0


class Served:
    """One model with its engine."""

    def __init__(self, name: str, engine: Engine, library: StateLibrary):
        self.name, self.engine, self.library = name, engine, library
        # the engine decodes in another thread, and encoding changes a tokenizer's settings
        self.tokenizer: PreTrainedTokenizerFast = copy.deepcopy(engine.tokenizer)
        self._encoding = threading.Lock()
        self.texts = TokenTexts(self.tokenizer)
        self.created = int(time.time())
        self.state_sizes = _state_sizes(engine.model)
        has_template = self.tokenizer.chat_template is not None
        turn = end_of_turn(self.tokenizer) if has_template else None
        self.chat_ends = frozenset(() if turn is None else (turn,))

    def encode(self, text: str, *, control_tokens: bool = False) -> list[int]:
        """The tokens of a text, as those of a training text."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"the text is not Unicode: {error.reason}", "prompt") from error
        with self._encoding:
            (ids,) = encode(self.tokenizer, [data], control_tokens=control_tokens)
        return [int(i) for i in ids]

    def encode_chat(
        self, messages: list[dict[str, str]], *, answer: bool = True
    ) -> tuple[list[int], tuple[int, ...]]:
        """The tokens of a chat, and where messages end; answer: and the beginning of an answer."""
        if self.tokenizer.chat_template is None:
            raise ApiError(
                400,
                f"messages: the tokenizer of {self.name} has no chat template; start the server"
                " with --chat-template FILE, or use /v1/completions",
                "messages",
            )
        if holds_control_token(self.tokenizer, messages):
            raise ApiError(
                400,
                "messages: a text holds a control token of the tokenizer, which would be read as"
                " the end of a turn",
                "messages",
            )
        text = render_messages(self.tokenizer, messages, answer=answer)
        ids = self.encode(text, control_tokens=True)
        return ids, self._borders(messages, text, ids)

    def _borders(
        self, messages: list[dict[str, str]], text: str, ids: list[int]
    ) -> tuple[int, ...]:
        """About where the first message ends, and the last but one, in tokens."""
        borders = []
        for count in {1, len(messages) - 1} - {0, len(messages)}:
            try:
                head = render_messages(self.tokenizer, messages[:count])
            except ValueError:  # templates may refuse such a beginning
                continue
            if text.startswith(head):
                known = self.encode(head, control_tokens=True)
                same = (i for i, (a, b) in enumerate(zip(known, ids)) if a != b)
                borders.append(next(same, len(known)))
        return tuple(borders)

    def check_tokens(self, tokens: list[int], name: str = "prompt") -> None:
        size = self.engine.model.config.vocab_size
        if tokens and (min(tokens) < 0 or max(tokens) >= size):
            raise ApiError(400, f"{name}: expected tokens from 0 to {size - 1:,}", name)

    def decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _state_sizes(model: Any) -> dict[str, int]:
    """The state of a sequence, and what a softmax model of the same sizes would keep."""
    at_once, later = (cache_bytes_after(model, n) for n in (2**20, 2**20 + 1))
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "state_bytes": at_once - 2**20 * (later - at_once),
        "state_bytes_per_token": later - at_once,
        "softmax_bytes_per_token": numbers * model.dtype.itemsize,
    }


def client_of(http: HttpRequest) -> str:
    """Who asks: by key, which `Guard` notes, or by address."""
    key: str = http.scope.get("state", {}).get("key", "")
    return key or (http.client.host if http.client else "")


@dataclass
class Service:
    """All models of a server."""

    models: dict[str, Served]
    limits: Limits = field(default_factory=Limits)
    bridge: Bridge | None = None
    draining: bool = False
    metrics: Any = None

    def connect(self) -> None:
        """Deliver events to the running event loop."""
        self.bridge = Bridge(asyncio.get_running_loop())
        for served in self.models.values():
            served.engine.delivered = self.bridge.wake

    def model(self, name: str | None) -> Served:
        """The model of that name; without a name the only one."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        served = self.models.get(name or "")
        if served is None:
            known = ", ".join(self.models)
            what = "model: name one of" if name is None else f"model: no {name!r} here; there is"
            raise ApiError(404 if name else 400, f"{what} {known}", "model", "model_not_found")
        return served

    def answers(self, served: Served, requests: list[Any]) -> Answers:
        """Submit requests. Raises an error at once if one cannot be taken."""
        assert self.bridge is not None
        for request in requests:
            if len(request.tokens) > self.limits.prompt_tokens:
                raise ApiError(
                    400,
                    f"prompt: {len(request.tokens):,} tokens; this server takes"
                    f" {self.limits.prompt_tokens:,}",
                    "prompt",
                )
        first = self.metrics.first_token.labels(served.name).observe
        answers = Answers(served.engine, self.bridge, requests, first)
        answers.submit()
        return answers
