"""Continuous batching: many requests on one model, each answered as if it were alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..models.rows import Piece, make_rows, state_numerics
from ..text.stream import IncrementalDecoder
from .counters import Counters
from .reading import BlockReading, EndedTexts, SlotReading
from .replies import Job, Reply, begin_job, next_pieces
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
    check_request,
)
from .sampling import Logits, Sampler, require_finite
from .snapshots import Snapshot, SnapshotStore
from .text import ReplyText, ending_tokens
from .watch import MemoryWatch

PIECE = 128  # tokens of prompts that are read with a token of each reply
MOST_TOKENS = 2**22  # of all prompts that wait


class Engine:
    """Reads prompts and draws replies for many requests at once, in a thread of its own.

    A step takes a token of each reply that is being drawn, and up to `piece` tokens of prompts. So
    no reply waits longer for its next token, however long the prompts of others are.

    Args:
        model: in evaluation mode; nothing else may use it meanwhile.
        tokenizer: the model's.
        slots: how many replies are drawn at a time.
        room: the most tokens of a request and its reply, if the model's state grows with them;
            None if it does not.
        snapshot_bytes: memory for the states of prefixes.
        piece: tokens of prompts in a step, and those of a piece of a prompt.
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
        self._threads = threads or torch.get_num_threads()
        root = state_numerics(model, piece, self._threads)
        self.store = SnapshotStore(snapshot_bytes, root=root)
        self._watch = MemoryWatch(self.store, memory)
        with torch.inference_mode():
            self._rows = make_rows(model, slots, room or 1, piece)
        barred = model.generation_config.suppress_tokens or []
        self._barred = np.array(sorted(barred), dtype=np.int64)
        self._ends = ending_tokens(model, tokenizer)
        self._lock = threading.Condition()
        self._waiting = Waiting()
        self._free = list(range(slots))[::-1]
        self._reading: deque[Job] = deque()
        self._drawing: list[Reply] = []
        self._ended = EndedTexts(model, self.store, piece)
        self._stop = ""  # "drain": after all requests; "now": at once
        self.delivered: Callable[[], None] = lambda: None  # called after a step's events
        self.ready = threading.Event()  # set when requests are looked at
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

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
                raise Busy(waiting, self.counters.seconds_of(waiting))
            self._waiting.add(ticket)
            self.counters.requests += 1
            self._lock.notify()
        return ticket

    def ask(self, request: Request) -> Ticket:
        """Submit a request, and return the ticket whose events answer it."""
        return self.submit(Ticket(request))

    def check(self, request: Request) -> None:
        """Raise a ValueError if the request can never be answered here."""
        check_request(request, self.model.config.vocab_size, self.slots, self.room)

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

    # --- the engine's thread ---

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                self._warm_up()
                self.ready.set()
                self._loop()
        finally:
            self._stop = "now"
            self._fail_all(Stopping("the server stopped before the reply was complete"))
            self.delivered()

    def _warm_up(self) -> None:
        """Take a step, which reads all weights."""
        self._rows.load(0, None)
        self._rows.run([Piece(0, (0,))])
        self._rows.free(0)

    def _loop(self) -> None:
        while self._wait_for_work():
            began = time.perf_counter()
            self._admit()
            self._watch.look()
            self.delivered()
            if not self._rows.exact:
                self._read_block()
            pieces = next_pieces(self._reading, self.piece) if self._rows.exact else []
            if self._drawing or pieces:
                self._step(pieces)
            self.counters.seconds_busy += time.perf_counter() - began

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; whether to go on."""
        if not (self._reading or self._drawing):
            self.delivered()
        with self._lock:
            self._forget_cancelled()
            while not (self._reading or self._drawing or self._ended or self._stop):
                if self._waiting.first() is not None:
                    break
                self._lock.wait()
                self._forget_cancelled()
            self.counters.waiting = len(self._waiting)
            busy = self._reading or self._drawing or self._waiting.first() is not None
            return self._stop != "now" and (bool(busy) or not self._stop)

    def _forget_cancelled(self) -> None:
        for job in [job for job in self._reading if job.ticket.cancelled]:
            self._reading.remove(job)
            self._release(job.slots)
        for reply in [reply for reply in self._drawing if reply.job.ticket.cancelled]:
            self._leave(reply)

    def _release(self, slots: list[int]) -> None:
        for slot in slots:
            self._rows.free(slot)
        self._free += slots

    def _admit(self) -> None:
        """Give slots to waiting requests, as long as there are enough for the next one."""
        while True:
            with self._lock:
                ticket = self._waiting.first()
                if ticket is None or ticket.request.replies > len(self._free):
                    return
                self._waiting.take()
                self.counters.waiting = len(self._waiting)
            slots = [self._free.pop() for _ in range(ticket.request.replies)]
            try:
                job = begin_job(ticket, slots, self._rows, self.model, self.store, self.piece)
            except Exception as error:
                self._fail(ticket, error)
                self._release(slots)
                continue
            self._reading.append(job)
            if job.reading.done and self._rows.exact:
                self._end_reading(job)

    def _read_block(self) -> None:
        """Read a piece of a prompt by the model's layers, or of an ended reply's text."""
        if not self._reading:
            if not self._drawing:
                self._ended.read_piece()
            return
        job = self._reading[0]
        self._reading.rotate(-1)
        assert isinstance(job.reading, BlockReading)
        try:
            if not job.reading.done:
                before = job.reading.position
                job.reading.read_piece()
                self.counters.prompt_tokens += job.reading.position - before
            if job.reading.done:
                self._end_reading(job)
        except Exception as error:
            self._fail_job(job, error)

    def _end_reading(self, job: Job) -> None:
        self._reading.remove(job)
        try:
            self._begin_replies(job)
        except Exception as error:
            self._fail_job(job, error)

    def _begin_replies(self, job: Job) -> None:
        """Tell that the prompt is read, and draw the first token of each reply."""
        request, reading = job.ticket.request, job.reading
        assert reading.logits is not None
        self.counters.cached_tokens += reading.cached
        self.counters.hits += reading.cached > 0
        self.counters.misses += reading.cached == 0
        read = Read(reading.cached, reading.scores)
        if request.keep_states:
            read.end, read.border = reading.snapshot(), reading.border
        self._deliver(job.ticket, read)
        if request.sampling.max_tokens == 0:
            self._deliver(job.ticket, Done())
            self._release(job.slots)
            return
        logits = reading.logits[0].numpy()
        require_finite(logits[logits.argmax()])
        begun, job.open = [], request.replies
        for index, slot in enumerate(job.slots):
            if isinstance(reading, BlockReading):
                self._rows.load(slot, reading.snapshot().state)
            elif index:
                self._rows.copy(job.slots[0], slot)
            decoder = IncrementalDecoder(self.tokenizer)
            decoder.read_prompt(list(request.tokens[-256:]))
            sampler = Sampler(request.sampling, request.tokens, self._barred, index)
            text = ReplyText(decoder, request.sampling.stop)
            begun.append(Reply(job, index, slot, sampler, text))
        self._drawing += begun
        for reply in begun:
            if not self._accept(reply, reply.sampler.draw(logits), logits):
                self._leave(reply)
        self.counters.rows = len(self._drawing)

    def _step(self, pieces: list[tuple[Job, Piece]]) -> None:
        """One token of every reply that is being drawn, and the pieces of prompts."""
        drawing = list(self._drawing)
        try:
            run = [Piece(reply.slot, reply.tokens[-1:]) for reply in drawing]
            logits = self._rows.run(run + [piece for _, piece in pieces])
        except Exception as error:
            self._fail_all(error, waiting=False)
            return
        self.counters.steps += 1
        self._draw(drawing, logits[: len(drawing)].numpy())
        at = len(drawing)
        for job, piece in pieces:
            self._take(job, piece, logits[at : at + piece.wanted])
            at += piece.wanted

    def _draw(self, drawing: list[Reply], logits: Logits) -> None:
        """The next token of each reply."""
        likeliest = logits.argmax(-1)  # of NaN if there is one
        for row, reply in enumerate(drawing):
            try:
                require_finite(logits[row, likeliest[row]])
                plain = reply.sampler.is_plain
                token = int(likeliest[row]) if plain else reply.sampler.draw(logits[row])
                if not self._accept(reply, token, logits[row]):
                    self._leave(reply)
            except Exception as error:  # of this request alone
                self._fail(reply.job.ticket, error)

    def _take(self, job: Job, piece: Piece, logits: Tensor) -> None:
        """A piece of a prompt was read."""
        assert isinstance(job.reading, SlotReading)
        try:
            job.reading.take(piece, logits)
            self.counters.prompt_tokens += len(piece.tokens)
            if job.reading.done:
                self._end_reading(job)
        except Exception as error:
            self._fail_job(job, error)

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

    def _leave(self, reply: Reply) -> None:
        """End a reply, and free its slot."""
        self._drawing.remove(reply)
        self._release([reply.slot])
        self.counters.rows = len(self._drawing)

    def _remember(self, reply: Reply) -> None:
        """Keep the state behind the reply's last but one token, for a prompt that goes on from it.

        The last token has not been read.
        """
        reading, read = reply.job.reading, reply.tokens[:-1]
        if reading.foreign or not read or not self.store.keeps:
            return
        if isinstance(reading, SlotReading):
            place = reading.keys.extended(read).place(len(reading.tokens) + len(read))
            self.store.put(place, Snapshot(self._rows.save(reply.slot), None), len(read))
            return
        self._ended.add([*reading.tokens, *read], len(reading.tokens))

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        if not ticket.cancelled:
            ticket.deliver(event)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if ticket.cancelled:
            return
        self.counters.failures += 1
        self._deliver(ticket, Failed(error))
        ticket.cancelled = True

    def _fail_job(self, job: Job, error: Exception) -> None:
        """End a request whose prompt was being read, with its replies if there are some."""
        self._fail(job.ticket, error)
        if job in self._reading:
            self._reading.remove(job)
        replies = [reply for reply in self._drawing if reply.job is job]
        if not replies:
            self._release([slot for slot in job.slots if slot not in self._free])
        for reply in replies:
            self._leave(reply)

    def _fail_all(self, error: Exception, *, waiting: bool = True) -> None:
        """End all requests that have slots, and those that wait."""
        jobs = {id(job): job for job in (*self._reading, *(r.job for r in self._drawing))}
        tickets = [job.ticket for job in jobs.values()]
        if waiting:
            with self._lock:
                tickets += self._waiting.clear()
        for job in jobs.values():
            self._fail_job(job, error)
        for ticket in tickets:
            self._fail(ticket, error)
