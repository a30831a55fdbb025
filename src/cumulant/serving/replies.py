"""Replies that are being drawn, and the requests that they belong to."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from ..models.rows import Piece, Rows
from .reading import BlockReading, Plan, SlotReading, TokenScores, score_token
from .requests import Ticket, Update
from .sampling import Logits, Sampler, log_probabilities
from .snapshots import SnapshotStore
from .text import ReplyText


@dataclass
class Job:
    """A request that is being read or drawn.

    slots: one for each reply; the prompt is read in the first. open: replies that are not complete.
    """

    ticket: Ticket
    reading: SlotReading | BlockReading
    slots: list[int]
    open: int = 0


def begin_job(
    ticket: Ticket, slots: list[int], rows: Rows, model: Any, store: SnapshotStore, piece: int
) -> Job:
    """Begin to read a request's prompt."""
    request = ticket.request
    plan = Plan(request.borders, request.start, request.prompt_scores, request.keep_states)
    if rows.exact:
        exact = SlotReading(rows, slots[0], store, request.tokens, piece, plan)
        return Job(ticket, exact, slots)
    return Job(ticket, BlockReading(model, store, request.tokens, piece, plan), slots)


def next_pieces(jobs: deque[Job], most: int) -> list[tuple[Job, Piece]]:
    """At most so many tokens of the prompts that are read in slots, which take turns."""
    pieces: list[tuple[Job, Piece]] = []
    for job in jobs:
        if not most:
            break
        assert isinstance(job.reading, SlotReading)
        pieces.append((job, job.reading.next_piece(most)))
        most -= len(pieces[-1][1].tokens)
    jobs.rotate(-len(pieces))
    return pieces


class Reply:
    """One sequence that is being drawn."""

    def __init__(self, job: Job, index: int, slot: int, sampler: Sampler, text: ReplyText):
        self.job, self.index, self.slot = job, index, slot
        self.sampler, self.text = sampler, text
        self.tokens: list[int] = []
        self._scores: list[TokenScores] = []  # of tokens whose text is held back

    def accept(self, token: int, logits: Logits, ends: frozenset[int]) -> Update:
        """Take the token that was drawn after `logits`."""
        request = self.job.ticket.request
        self.tokens.append(token)
        count, reason, text = len(self.tokens), None, ""
        if token in ends or token in request.ends:
            reason = "stop"
        else:
            text = self.text.add(token)
            if request.top_scores is not None:
                found = score_token(log_probabilities(logits), token, request.top_scores)
                self._scores.append(found)
            if self.text.stopped:
                reason = "stop"
                self._scores.clear()
            elif count == request.sampling.max_tokens:
                reason = "length"
        if reason is not None:
            text += self.text.finish()
        scores: list[TokenScores] = []
        if reason is not None or not self.text.holds:
            scores, self._scores = self._scores, []
        return Update(self.index, text, count, scores, reason)
