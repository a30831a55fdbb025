"""From the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from ..engine import Engine
from ..requests import Done, Event, Failed, Request, Ticket, Update

Tagged = tuple[int, Event]
MOST_UNREAD = 8192  # events that wait for a client


class Stalled(RuntimeError):
    """A client does not read what it asked for."""


class Bridge:
    """Hands events over to an event loop, those of one step together.

    The loop is woken once a step, when the engine's thread goes back into native code. Woken at the
    first event, it would compete with that thread for the interpreter.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._lock = loop, threading.Lock()
        self._pending: list[tuple[asyncio.Queue[Tagged | None], Tagged]] = []

    def put(self, queue: asyncio.Queue[Tagged | None], event: Tagged) -> None:
        """Called by any thread."""
        with self._lock:
            self._pending.append((queue, event))

    def wake(self) -> None:
        """Let the loop look at the events so far. Called by any thread."""
        if self._pending:
            try:
                self._loop.call_soon_threadsafe(self._flush)
            except RuntimeError:  # the loop is closed, and nobody waits
                return

    def _flush(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for queue, event in pending:
            queue.put_nowait(event)


class _Tagged(Ticket):
    """A ticket whose events go to a queue, with its number."""

    def __init__(
        self, request: Request, number: int, queue: asyncio.Queue[Tagged | None], to: Bridge
    ):
        super().__init__(request)
        self._number, self._queue, self._bridge = number, queue, to

    def deliver(self, event: Event) -> None:
        if self._queue.qsize() > MOST_UNREAD:
            event = Failed(Stalled("the client reads too slowly; its reply was stopped"))
            self.cancel()
        self._bridge.put(self._queue, (self._number, event))


class Answers:
    """The answers to requests, each event with the number of its request.

    Leaving the context cancels what is not answered. on_first: called with the seconds until each
    request's first token.
    """

    def __init__(
        self,
        engine: Engine,
        bridge: Bridge,
        requests: Sequence[Request],
        on_first: Callable[[float], None],
    ):
        self._engine, self._queue = engine, asyncio.Queue[Tagged | None]()
        self._on_first, self._started = on_first, time.perf_counter()
        self._tickets = [
            _Tagged(request, i, self._queue, bridge) for i, request in enumerate(requests)
        ]

    def submit(self) -> None:
        """Submit all requests, or none: raises what `Engine.submit` does."""
        for ticket in self._tickets:
            self._engine.check(ticket.request)
        try:
            for ticket in self._tickets:
                self._engine.submit(ticket)
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()
        self._engine.wake()

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.cancel()

    def __del__(self) -> None:  # of a stream that never began, because its client had gone
        self.cancel()

    async def events(self, tick: float | None = None) -> AsyncIterator[Tagged | None]:
        """All events; None after each `tick` seconds. Raises the error of a request that failed."""
        loop, left, begun = asyncio.get_running_loop(), len(self._tickets), set()
        timer: asyncio.TimerHandle | None = None

        def ring() -> None:
            nonlocal timer
            self._queue.put_nowait(None)
            timer = loop.call_later(tick or 0, ring)

        if tick is not None:
            timer = loop.call_later(tick, ring)
        try:
            while left:
                tagged = await self._queue.get()
                if tagged is not None:
                    number, event = tagged
                    if isinstance(event, Failed):
                        raise event.error
                    left -= isinstance(event, Done)
                    if isinstance(event, Update) and number not in begun:
                        begun.add(number)
                        self._on_first(time.perf_counter() - self._started)
                yield tagged
        finally:
            if timer is not None:
                timer.cancel()
