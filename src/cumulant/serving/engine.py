"""Continuous batching: many requests on one model, each answered as if it were alone."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ..models.rows import make_rows
from ..text.stream import IncrementalDecoder
from .counters import Counters
from .reading import Reading
from .replies import Job, Reply
from .requests import (
    Busy,
    Done,
    Event,
    Failed,
    Read,
    Request,
    Stopping,
    Ticket,
    Waiting,
)
from .sampling import Logits, Sampler
from .snapshots import SnapshotStore
from .text import ReplyText
from .watch import MemoryWatch

log = logging.getLogger("cumulant.serving")
PIECE = 128  # tokens of a prompt that are read between two steps of the others
STEPS_BETWEEN = 4  # steps of replies between two pieces of the text of an ended one
MOST_TOKENS = 2**22  # of all prompts that wait
MOST_SCORED = 2**15  # tokens of a prompt whose log-probabilities are wanted
MOST_ENDED = 256  # ended replies whose text may wait to be read


class Engine:
    """Reads prompts and draws replies for many requests at once, in a thread of its own.

    After each step of all replies that are being drawn, at most one piece of one prompt is read.
    So a reply waits for its next token at most for a piece of `piece` tokens and a step.

    Args:
        model: in evaluation mode; nothing else may use it meanwhile.
        tokenizer: the model's.
        slots: how many replies are drawn at a time.
        room: the most tokens of a request and its reply, if the model's state grows with them;
            None if it does not.
        snapshot_bytes: memory for the states of prefixes.
        piece: tokens of a piece of a prompt.
        most_waiting: requests that may wait for a slot.
        memory: bytes of the process that may be resident: near them snapshots are dropped.
        threads: of PyTorch; 0: as it has.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerFast,
        *,
        slots: int = 16,
        room: int | None = None,
        snapshot_bytes: int = 256 * 2**20,
        piece: int = PIECE,
        most_waiting: int = 256,
        memory: int | None = None,
        threads: int = 0,
    ):
        for name, value in (("slots", slots), ("piece", piece)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.room, self.piece = slots, room, piece
        self.most_waiting, self.counters = most_waiting, Counters()
        self.store = SnapshotStore(snapshot_bytes)
        self._watch = MemoryWatch(self.store, memory)
        self._threads = threads or torch.get_num_threads()
        with torch.inference_mode():
            self._rows = make_rows(model, slots, room or 1)
        barred = model.generation_config.suppress_tokens or []
        self._barred = np.array(sorted(barred), dtype=np.int64)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
        self._ends = frozenset(int(i) for i in ends if i is not None)
        self._lock = threading.Condition()
        self._waiting = Waiting()
        self._reading: deque[Job] = deque()
        self._drawing: list[Reply] = []  # in the order of their rows
        self._ended: deque[list[int]] = deque(maxlen=MOST_ENDED)  # texts with their replies
        self._remembering: Reading | None = None
        self._stop = ""  # "drain": after all requests; "now": at once
        self._thread = threading.Thread(target=self._run, name="cumulant-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> Ticket:
        """Let a request wait for its turn.

        Raises:
            ValueError: it can never be answered here.
            Busy: too many wait.
            Stopping: the engine is being stopped.
        """
        self.check(ticket.request)
        with self._lock:
            if self._stop:
                raise Stopping("the server is stopping; ask another")
            waiting = len(self._waiting)
            tokens = self._waiting.tokens + len(ticket.request.tokens)
            if waiting >= self.most_waiting or (waiting and tokens > MOST_TOKENS):
                raise Busy(waiting, self._seconds_of(waiting))
            self._waiting.add(ticket)
            self.counters.requests += 1
            self._lock.notify()
        return ticket

    def ask(self, request: Request) -> Ticket:
        """Submit a request, and return the ticket whose events answer it."""
        return self.submit(Ticket(request))

    def check(self, request: Request) -> None:
        """Raise a ValueError if the request can never be answered here."""
        count, size = len(request.tokens), self.model.config.vocab_size
        if not count:
            raise ValueError("prompt: expected at least one token, got none")
        if min(request.tokens) < 0 or max(request.tokens) >= size:
            raise ValueError(f"prompt: expected tokens from 0 to {size - 1:,}")
        if not all(0 <= token < size for token in request.sampling.logit_bias):
            raise ValueError(f"logit_bias: expected tokens from 0 to {size - 1:,}")
        if not 1 <= request.replies <= self.slots:
            raise ValueError(
                f"n: expected 1 to {self.slots} (the server's slots), got {request.replies}"
            )
        if request.prompt_scores is not None and count > MOST_SCORED:
            raise ValueError(
                f"prompt: expected at most {MOST_SCORED:,} tokens with log-probabilities of the"
                f" prompt, got {count:,}"
            )
        if self.room is not None and count + request.sampling.max_tokens > self.room:
            raise ValueError(
                f"this model's context is limited to {self.room:,} tokens here; the prompt has"
                f" {count:,}, and max_tokens is {request.sampling.max_tokens:,}"
            )

    def wake(self) -> None:
        """Let the engine look at its tickets, one of which was cancelled."""
        with self._lock:
            self._lock.notify()

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """End the thread, after all requests or at once; whether it has ended.

        Requests that do not finish get a `Failed` with `Stopping`.
        """
        with self._lock:
            self._stop = "drain" if drain and self._stop != "now" else "now"
            self._lock.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _seconds_of(self, waiting: int) -> int:
        """About how long as many requests take, from those before."""
        done = max(self.counters.requests - waiting, 1)
        return max(1, min(60, round(self.counters.seconds_busy / done)))

    # --- the engine's thread ---

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                self._loop()
        finally:
            self._stop = "now"
            self._fail_all(Stopping("the server stopped before the reply was complete"))

    def _loop(self) -> None:
        steps = 0
        while self._wait_for_work():
            began = time.perf_counter()
            self._admit()
            self._watch.look()
            if self._reading:
                self._read(self._reading.popleft())
            elif self._has_ended and (steps % STEPS_BETWEEN == 0 or not self._drawing):
                self._read_ended()
            if self._drawing:
                self._step()
                steps += 1
            self.counters.seconds_busy += time.perf_counter() - began

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; whether to go on."""
        with self._lock:
            self._forget_cancelled()
            while not (self._reading or self._drawing or self._has_ended or self._stop):
                if self._waiting.first() is not None:
                    break
                self._lock.wait()
                self._forget_cancelled()
            self.counters.waiting = len(self._waiting)
            busy = self._reading or self._drawing or self._waiting.first() is not None
            return self._stop != "now" and (bool(busy) or not self._stop)

    @property
    def _has_ended(self) -> bool:
        return bool(self._ended) or self._remembering is not None

    def _forget_cancelled(self) -> None:
        gone = [job for job in self._reading if job.ticket.cancelled]
        for job in gone:
            self._reading.remove(job)
        for row in range(len(self._drawing) - 1, -1, -1):
            if self._drawing[row].job.ticket.cancelled:
                self._leave(row)

    def _admit(self) -> None:
        """Give rows to waiting requests, as long as there are enough for the next one."""
        while True:
            taken = len(self._drawing) + sum(job.ticket.request.replies for job in self._reading)
            with self._lock:
                ticket = self._waiting.first()
                if ticket is None or taken + ticket.request.replies > self.slots:
                    return
                self._waiting.take()
                self.counters.waiting = len(self._waiting)
            try:
                self._reading.append(self._begin(ticket))
            except Exception as error:
                self._fail(ticket, error)

    def _begin(self, ticket: Ticket) -> Job:
        request = ticket.request
        reading = Reading(
            self.model,
            self.store,
            request.tokens,
            self.piece,
            borders=request.borders,
            start=request.start,
            scored=request.prompt_scores,
            keep_border=request.keep_states,
        )
        return Job(ticket, reading)

    def _read(self, job: Job) -> None:
        """Read a piece of a prompt, and draw its first tokens if it was the last."""
        reading, ticket = job.reading, job.ticket
        try:
            if not reading.done:
                before = reading.position
                reading.read_piece()
                self.counters.prompt_tokens += reading.position - before
            if not reading.done:
                self._reading.append(job)
                return
            self.counters.cached_tokens += reading.cached
            self.counters.hits += reading.cached > 0
            self.counters.misses += reading.cached == 0
            read = Read(reading.cached, reading.scores)
            if ticket.request.keep_states:
                read.end, read.border = reading.snapshot(), reading.border
            self._deliver(ticket, read)
            self._begin_replies(job)
        except Exception as error:
            self._fail(ticket, error)

    def _begin_replies(self, job: Job) -> None:
        """Draw the first token of each reply from the prompt's last logits."""
        request, reading = job.ticket.request, job.reading
        assert reading.logits is not None
        if request.sampling.max_tokens == 0:
            self._deliver(job.ticket, Done())
            return
        logits = reading.logits[0].numpy()
        job.open = request.replies
        for index in range(request.replies):
            decoder = IncrementalDecoder(self.tokenizer)
            decoder.read_prompt(list(request.tokens[-256:]))
            sampler = Sampler(request.sampling, request.tokens, self._barred, index)
            text = ReplyText(decoder, request.sampling.stop)
            reply = Reply(job, index, sampler, text)
            if self._accept(reply, sampler.draw(logits), logits):
                self._rows.write(len(self._drawing), reading.cache)
                self._drawing.append(reply)
        self.counters.rows = len(self._drawing)

    def _step(self) -> None:
        """One token of every reply that is being drawn."""
        try:
            ids = torch.tensor([reply.tokens[-1] for reply in self._drawing])
            logits = self._rows.step(ids).numpy()
        except Exception as error:
            self._fail_all(error, waiting=False)
            return
        self.counters.steps += 1
        likeliest = logits.argmax(-1)  # of NaN if there is one
        ended = []
        for row, reply in enumerate(self._drawing):
            try:
                if not np.isfinite(logits[row, likeliest[row]]):
                    raise FloatingPointError("the model's logits are not finite")
                plain = reply.sampler.is_plain
                token = int(likeliest[row]) if plain else reply.sampler.draw(logits[row])
                if not self._accept(reply, token, logits[row]):
                    ended.append(row)
            except Exception as error:  # of this reply alone
                if not reply.job.ticket.cancelled:
                    self._fail(reply.job.ticket, error)
        for row in reversed(ended):
            self._leave(row)

    def _accept(self, reply: Reply, token: int, logits: Logits) -> bool:
        """Take a token of a reply and tell its ticket; whether the reply goes on."""
        update = reply.accept(token, logits, self._ends)
        self.counters.reply_tokens += 1
        self._deliver(reply.job.ticket, update)
        if update.finish_reason is None:
            return True
        reply.job.open -= 1
        self._remember(reply)
        if not reply.job.open:
            self._deliver(reply.job.ticket, Done())
        return False

    def _leave(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        last = self._drawing.pop()
        if row < len(self._drawing):
            self._rows.move(len(self._drawing), row)
            self._drawing[row] = last
        self.counters.rows = len(self._drawing)

    def _remember(self, reply: Reply) -> None:
        """Have the text with its reply read in whole pieces, for a prompt that goes on from it."""
        tokens = [*reply.job.ticket.request.tokens, *reply.tokens]
        request = reply.job.ticket.request
        before = len(request.tokens) // self.piece
        if len(tokens) // self.piece > before and self.store.budget and request.start is None:
            self._ended.append(tokens)

    def _read_ended(self) -> None:
        """Read a piece of an ended reply's text."""
        try:
            if self._remembering is None:
                tokens = self._ended.popleft()
                self._remembering = Reading(self.model, self.store, tokens, self.piece, whole=False)
            if not self._remembering.done:
                self._remembering.read_piece()
            if self._remembering.done:
                self._remembering = None
        except Exception:
            log.exception("an ended reply cannot be read")
            self._remembering = None

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        if not ticket.cancelled:
            ticket.deliver(event)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self.counters.failures += 1
        self._deliver(ticket, Failed(error))
        ticket.cancelled = True

    def _fail_all(self, error: Exception, *, waiting: bool = True) -> None:
        """End all requests that have rows, and those that wait."""
        tickets = {reply.job.ticket: None for reply in self._drawing}
        self._drawing.clear()
        self.counters.rows = 0
        if waiting:
            with self._lock:
                tickets |= {job.ticket: None for job in self._reading}
                tickets |= dict.fromkeys(self._waiting.clear())
                self._reading.clear()
        for ticket in tickets:
            if not ticket.cancelled:
                self._fail(ticket, error)
