"""Replies that are being drawn, and the requests that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from .reading import Reading, TokenScores, score_token
from .requests import Ticket, Update
from .sampling import Logits, Sampler, log_probabilities
from .text import ReplyText


@dataclass
class Job:
    """A request that has rows, and is being read or drawn. open: replies that are not complete."""

    ticket: Ticket
    reading: Reading
    open: int = 0


class Reply:
    """One sequence that is being drawn."""

    def __init__(self, job: Job, index: int, sampler: Sampler, text: ReplyText):
        self.job, self.index, self.sampler, self.text = job, index, sampler, text
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
