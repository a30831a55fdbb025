"""What an engine is asked, and what it answers."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field

from .reading import TokenScores
from .sampling import SamplingOptions
from .snapshots import Snapshot


@dataclass(frozen=True)
class Request:
    """A prompt to read and replies to draw.

    tokens: the prompt, at least one token; the text of `start` is part of it.
    replies: how many, each with random numbers of its own.
    top_scores: None, or how many of the likeliest tokens to list at each place of a reply;
        prompt_scores: the same for the prompt.
    borders: positions in the prompt before which other prompts may part from it.
    start: a snapshot of the first tokens, and their number.
    client: whose request it is; waiting clients take turns.
    ends: tokens that end a reply, besides those that end a text.
    keep_states: answer with the states after the prompt (`Read.end` and `Read.border`).
    """

    tokens: tuple[int, ...]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    replies: int = 1
    top_scores: int | None = None
    prompt_scores: int | None = None
    borders: tuple[int, ...] = ()
    start: tuple[Snapshot, int] | None = None
    client: str = ""
    ends: frozenset[int] = frozenset()
    keep_states: bool = False


MOST_SCORED = 2**15  # tokens of a prompt whose log-probabilities are wanted


def check_request(request: Request, vocabulary: int, slots: int, room: int | None) -> None:
    """Raise a ValueError if an engine with so many slots can never answer.

    vocabulary: tokens that the model knows. room: tokens of a context; None: any number.
    """
    count = len(request.tokens)
    if not count:
        raise ValueError("prompt: expected at least one token, got none")
    if min(request.tokens) < 0 or max(request.tokens) >= vocabulary:
        raise ValueError(f"prompt: expected tokens from 0 to {vocabulary - 1:,}")
    if not all(0 <= token < vocabulary for token in request.sampling.logit_bias):
        raise ValueError(f"logit_bias: expected tokens from 0 to {vocabulary - 1:,}")
    if not 1 <= request.replies <= slots:
        raise ValueError(f"n: expected 1 to {slots} (the server's slots), got {request.replies}")
    if request.prompt_scores is not None and count > MOST_SCORED:
        raise ValueError(
            f"prompt: expected at most {MOST_SCORED:,} tokens with log-probabilities of the"
            f" prompt, got {count:,}"
        )
    if room is not None and count + request.sampling.max_tokens > room:
        raise ValueError(
            f"this model's context is limited to {room:,} tokens here; the prompt has"
            f" {count:,}, and max_tokens is {request.sampling.max_tokens:,}"
        )


@dataclass
class Read:
    """The prompt has been read, all but the first `cached_tokens` now."""

    cached_tokens: int
    scores: list[TokenScores] | None = None
    end: Snapshot | None = None
    border: tuple[Snapshot, int] | None = None  # after the last whole piece


@dataclass
class Update:
    """A token of a reply: the text that is certain now, and why the reply ends, if it does.

    scores: of the tokens of that text.

    finish_reason: "stop" (a text of `stop`, or the token that ends a text), "length", or None.
    tokens: those of the reply so far.
    """

    index: int
    text: str
    tokens: int
    scores: list[TokenScores] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Failed:
    """The request ended with an error."""

    error: Exception


@dataclass
class Done:
    """All replies are complete."""


Event = Read | Update | Failed | Done


class Ticket:
    """A request's place in an engine. Iterating over it gives its events as they come."""

    def __init__(self, request: Request):
        self.request, self.cancelled = request, False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def deliver(self, event: Event) -> None:
        """Called by the engine's thread."""
        self._events.put(event)

    def cancel(self) -> None:
        """Let the engine forget the request before its next step."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Done):
                return


class Busy(RuntimeError):
    """As many requests wait as may. retry_after: seconds until some are likely done."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting, as many as may; try again later")
        self.retry_after = retry_after


class Stopping(RuntimeError):
    """The engine takes no further requests."""


class Waiting:
    """Tickets in the order of their turns: clients take turns, each with its oldest first."""

    def __init__(self) -> None:
        self._clients: dict[str, list[Ticket]] = {}

    def __len__(self) -> int:
        return sum(not t.cancelled for tickets in self._clients.values() for t in tickets)

    @property
    def tokens(self) -> int:
        return sum(
            len(t.request.tokens)
            for tickets in self._clients.values()
            for t in tickets
            if not t.cancelled
        )

    def add(self, ticket: Ticket) -> None:
        self._clients.setdefault(ticket.request.client, []).append(ticket)

    def first(self) -> Ticket | None:
        """Whose turn it is."""
        for client in list(self._clients):
            tickets = self._clients[client] = [t for t in self._clients[client] if not t.cancelled]
            if tickets:
                return tickets[0]
            del self._clients[client]
        return None

    def take(self) -> Ticket:
        """Remove the ticket whose turn it is, and put its client behind the others."""
        ticket = self.first()
        assert ticket is not None
        client = ticket.request.client
        tickets = self._clients.pop(client)[1:]
        if tickets:
            self._clients[client] = tickets
        return ticket

    def clear(self) -> list[Ticket]:
        """Remove and return all."""
        found = [t for tickets in self._clients.values() for t in tickets]
        self._clients.clear()
        return found
