"""Every reply is bit for bit that of the same request alone, whatever else runs."""

import random
import threading
import time

import pytest
import torch

from cumulant.models import PRESETS
from cumulant.models.rows import SeparateRows
from cumulant.serving import Busy, Done, Engine, Request, Stopping, Ticket
from cumulant.serving import engine as engine_module
from cumulant.serving.reading import BlockReading, Reading

from ..quick import slow_but
from .common import (
    PIECE,
    answer,
    build,
    chat_tokenizer,
    prompt,
    request,
    running,
    sampling,
    wait_until,
)

KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9},
    {"top_k": 7, "repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": 0.4},
]


def requests(count=12):
    """Requests of many lengths, some with a common prefix, with and without scores."""
    found = []
    for i in range(count):
        options = KINDS[i % len(KINDS)] | {"seed": i, "max_tokens": 3 + 5 * (i % 5)}
        one = request(5 + 17 * (i % 6), text=i % 3, top_scores=2 if i % 2 else None, **options)
        found.append(one)
    found.append(request(30, replies=3, seed=5, top_scores=0))
    found.append(request(50, text=2, prompt_scores=2, max_tokens=0))
    return found


@pytest.mark.parametrize("preset", slow_but(["taylor", "softmax", "based", "flash"], PRESETS))
def test_replies_are_those_of_requests_alone(preset):
    model, wanted = build(preset), []
    for one in requests():
        with running(model, slots=3, snapshot_bytes=0) as engine:
            wanted.append(answer(engine.ask(one)))
    for seed in (0, 1):
        order = list(range(len(wanted)))
        random.Random(seed).shuffle(order)
        with running(model, slots=4, snapshot_bytes=2**24) as engine:
            tickets = {}
            for n, i in enumerate(order):
                tickets[i] = engine.ask(requests()[i])
                if n % 4 == 3:
                    time.sleep(0.01)  # some join while others are drawn
            for i, ticket in tickets.items():
                read, replies = answer(ticket)
                assert replies == wanted[i][1], i
                assert read.scores == wanted[i][0].scores, i
            # and once more, from snapshots
            for i in range(len(wanted)):
                assert answer(engine.ask(requests()[i]))[1] == wanted[i][1], i
            assert engine.counters.cached_tokens > 0


def test_models_without_a_program(monkeypatch):
    model = build("taylor").double()
    with running(model, slots=2) as engine:
        assert isinstance(engine._rows, SeparateRows)
        alone = [answer(engine.ask(request(30, text=i)))[1] for i in range(4)]
        tickets = [engine.ask(request(30, text=i)) for i in range(4)]
        assert [answer(t)[1] for t in tickets] == alone


def test_replies_are_those_of_the_model():
    model = build("taylor")
    one = request(40, temperature=0, max_tokens=30)
    with running(model) as engine:
        _, (reply,) = answer(engine.ask(one))
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([one.tokens]), max_new_tokens=30, do_sample=False, pad_token_id=256
        )
    drawn = [int(i) for i in ids[0, 40:]]
    assert reply["tokens"] == len(drawn)
    text = bytes(i for i in drawn if i < 256)
    whole = bytes(i for i in one.tokens) + text
    expected = whole.decode(errors="replace")
    assert expected.endswith(reply["text"])


@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_a_second_turn_reads_only_what_is_new(preset):
    model = build(preset)
    with running(model, snapshot_bytes=2**26) as engine:
        first = request(200, max_tokens=150, text=1, logit_bias={256: -100.0}, top_scores=0)
        read, (reply,) = answer(engine.ask(first))
        assert read.cached_tokens == 0
        drawn = tuple(score.token for score in reply["scores"])
        assert len(drawn) == 150
        wait_until(lambda: not engine._ended)
        again, _ = answer(engine.ask(first))
        assert again.cached_tokens == 200
        second = Request((*first.tokens, *drawn, *prompt(5, 9)), sampling())
        read, replies = answer(engine.ask(second))
        whole = 349 // PIECE * PIECE  # the last token of a reply has not been read
        assert read.cached_tokens == (whole if preset == "softmax" else 349)
    with running(model, snapshot_bytes=0) as engine:
        assert answer(engine.ask(second))[1] == replies


def test_ends_and_stops():
    model = build("taylor")
    bias = {256: 100.0}
    with running(model) as engine:
        _, (reply,) = answer(engine.ask(request(20, logit_bias=bias)))
        assert (reply["end"], reply["text"], reply["tokens"]) == ("stop", "", 1)
        other = request(20, logit_bias={257: 100.0}, ends=frozenset((257,)))
        assert answer(engine.ask(other))[1][0]["end"] == "stop"
        _, (free,) = answer(engine.ask(request(20, max_tokens=60, logit_bias={256: -100.0})))
        assert free["end"] == "length"
        word = next(free["text"][i : i + 2] for i in range(9, 40) if free["text"][i].isascii())
        stopped = request(20, max_tokens=60, stop=(word,), logit_bias={256: -100.0})
        _, (reply,) = answer(engine.ask(stopped))
        assert reply["end"] == "stop"
        assert reply["text"] == free["text"][: free["text"].find(word)]
        read, replies = answer(engine.ask(request(20, max_tokens=0)))
        assert read is not None
        assert replies == []


def test_clients_take_turns_and_the_queue_has_an_end():
    engine = Engine(build(), chat_tokenizer(), slots=1, most_waiting=6, piece=PIECE)
    order = []

    class Noted(Ticket):
        def deliver(self, event):
            if isinstance(event, Done):
                order.append(self.request.client)
            super().deliver(event)

    tickets = [Noted(request(10, client=c)) for c in ("a", "a", "a", "a", "b", "c")]
    for ticket in tickets:
        engine.submit(ticket)
    with pytest.raises(Busy) as busy:
        engine.ask(request(10))
    assert busy.value.retry_after >= 1
    tickets[1].cancel()
    engine.start()
    for i in (0, 2, 3, 4, 5):
        answer(tickets[i])
    assert order == ["a", "b", "c", "a", "a"]
    assert engine.stop(timeout=30)
    with pytest.raises(Stopping):
        engine.ask(request(10))


def test_cancelled_requests_free_their_rows():
    with running(build(), slots=2) as engine:
        endless = {"max_tokens": 10**6, "logit_bias": {256: -100.0}}
        tickets = [engine.ask(request(10, text=i, **endless)) for i in range(2)]
        wait_until(lambda: engine.counters.rows == 2)
        waiting = engine.ask(request(10))
        tickets[0].cancel()
        engine.wake()
        assert answer(waiting)[1][0]["end"] is not None
        tickets[1].cancel()
        engine.wake()
        wait_until(lambda: engine.counters.rows == 0)


@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_a_long_prompt_does_not_stop_the_others(preset, monkeypatch):
    """In each step every reply gets a token, and prompts at most as many as a piece has."""
    model, log = build(preset), []
    next_pieces, step = engine_module.next_pieces, Engine._step

    def noted(*arguments):
        pieces = next_pieces(*arguments)
        log.append(sum(len(piece.tokens) for _, piece in pieces))
        return pieces

    read = BlockReading.read_piece
    monkeypatch.setattr(engine_module, "next_pieces", noted)
    monkeypatch.setattr(BlockReading, "read_piece", lambda r: (log.append(PIECE), read(r))[1])
    monkeypatch.setattr(Engine, "_step", lambda *a: (log.append("step"), step(*a))[1])
    count = 25 if preset == "softmax" else 60
    with running(model, slots=3) as engine:
        stream = engine.ask(request(10, max_tokens=400, logit_bias={256: -100.0}))
        wait_until(lambda: engine.counters.rows == 1)
        for seed in (1, 2):
            engine.ask(request(count * PIECE, text=seed, max_tokens=1))
        answer(stream)
    first, last = log.index("step"), len(log) - log[::-1].index("step")
    read_between = [0]
    for entry in log[first:last]:
        if entry == "step":
            read_between.append(0)
        else:
            read_between[-1] += entry
    assert max(read_between) == PIECE
    assert sum(read_between) >= 2 * (count - 1) * PIECE


def test_stopping_lets_replies_finish_or_not():
    endless = {"max_tokens": 10**6, "logit_bias": {256: -100.0}}
    model = build()
    with running(model) as engine:
        ticket = engine.ask(request(10, max_tokens=50, logit_bias={256: -100.0}))
        assert engine.stop(timeout=60)
        assert answer(ticket)[1][0]["tokens"] == 50
    with running(model, slots=1) as engine:
        drawn, waiting = (engine.ask(request(10, text=i, **endless)) for i in range(2))
        wait_until(lambda: engine.counters.rows == 1)
        assert not engine.stop(timeout=0.1)
        assert engine.stop(drain=False, timeout=60)
        for ticket in (drawn, waiting):
            with pytest.raises(Stopping):
                answer(ticket)


@pytest.mark.parametrize("preset", ["taylor", "softmax"])
def test_a_request_that_fails_leaves_the_others(preset, monkeypatch):
    model = build(preset)
    advance = Reading._advance

    def fail(reading, *arguments):
        if reading.tokens[0] == 7:
            raise RuntimeError("broken")
        advance(reading, *arguments)

    monkeypatch.setattr(Reading, "_advance", fail)
    with running(model, slots=2) as engine:
        for _ in range(3):
            good = engine.ask(request(30))
            bad = engine.ask(Request((7, 1, 2), sampling(), replies=2))
            assert answer(good)[1]
            with pytest.raises(RuntimeError, match="broken"):
                answer(bad)
        assert len(answer(engine.ask(request(30, replies=2)))[1]) == 2
        assert engine.counters.failures == 3


def test_an_ended_reply_that_cannot_be_read_is_forgotten(monkeypatch):
    model = build("softmax")
    begin = BlockReading.read_piece

    def fail(reading):
        if len(reading.tokens) > 2 * PIECE and len(reading.tokens) % PIECE == 0:
            raise ValueError("not this one")
        begin(reading)

    monkeypatch.setattr(BlockReading, "read_piece", fail)
    with running(model) as engine:
        for text in range(3):
            one = request(30, text=text, max_tokens=60, logit_bias={256: -100.0})
            assert answer(engine.ask(one))[1][0]["tokens"] == 60
        wait_until(lambda: not engine._ended)
        assert engine.running


def test_a_thread_that_ends_tells_everybody(monkeypatch):
    def fail(engine):
        raise MemoryError

    monkeypatch.setattr(Engine, "_admit", fail)
    engine = Engine(build(), chat_tokenizer(), piece=PIECE)
    ticket = engine.ask(request(10))
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    engine.start()
    with pytest.raises(Stopping):
        answer(ticket)
    engine._thread.join()
    with pytest.raises(Stopping):
        engine.ask(request(10))


def test_scored_and_plain_prompts_do_not_mix():
    """The logits of all rows round differently from those of the last alone."""
    model = build(hidden_size=64)
    plain, scored = request(50, top_scores=0), request(50, top_scores=0, prompt_scores=0)
    with running(model, snapshot_bytes=2**24) as engine:
        first = answer(engine.ask(scored))[1]
        again = answer(engine.ask(plain))[1]
        assert answer(engine.ask(scored))[1] == first
    with running(model, snapshot_bytes=0) as engine:
        assert answer(engine.ask(plain))[1] == again


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Request(()), "prompt: expected at least one token"),
        (Request((1, 259)), "prompt: expected tokens from 0 to 258"),
        (Request((-1,)), "prompt: expected tokens"),
        (request(5, replies=5), "n: expected 1 to 4"),
        (request(5, replies=0), "n: expected 1 to 4"),
        (request(5, logit_bias={999: 1.0}), "logit_bias: expected tokens"),
        (request(500, max_tokens=20), "limited to 512 tokens"),
    ],
)
def test_bad_requests(bad, message):
    with running(build("softmax"), slots=4) as engine, pytest.raises(ValueError, match=message):
        engine.ask(bad)


def test_many_threads_ask_at_once():
    model, failures = build(), []
    with running(model, slots=5, snapshot_bytes=2**22) as engine:
        wanted = {i: answer(engine.ask(request(20 + i, text=i)))[1] for i in range(8)}

        def ask(n):
            for i in range(6):
                if (
                    answer(engine.ask(request(20 + (n + i) % 8, text=(n + i) % 8)))[1]
                    != (wanted[(n + i) % 8])
                ):
                    failures.append((n, i))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.counters.rows == 0
        assert engine.store.size <= engine.store.budget
    assert not failures
