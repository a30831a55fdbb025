"""The HTTP API: completions, chats, tokens, errors."""

import json
import math
import threading
import time

import pytest
import torch

from cumulant.serving import Engine, Request
from cumulant.serving.http.service import Limits

from .common import answer, build, sampling, wait_until

FIXED = {"model": "small", "temperature": 0.8, "seed": 3, "logit_bias": {"256": -100}}


def complete(server, **body):
    return server.post("/v1/completions", **FIXED | body)


def events(server, path, **body):
    """The data of a stream's events."""
    with server.http.stream("POST", path, json=FIXED | {"stream": True} | body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_completion(server):
    found = complete(server, prompt="Once upon a time", max_tokens=9)
    assert found["object"] == "text_completion"
    assert found["model"] == "small"
    (choice,) = found["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert found["usage"]["prompt_tokens"] == 16
    assert found["usage"]["completion_tokens"] == 9
    assert found["usage"]["total_tokens"] == 25
    ids = tuple(b"Once upon a time")
    wanted = Request(ids, sampling(max_tokens=9, temperature=0.8, seed=3, logit_bias={256: -100.0}))
    assert answer(server.engine.ask(wanted))[1][0]["text"] == choice["text"]
    again = complete(server, prompt="Once upon a time", max_tokens=9)
    assert again["choices"] == found["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 16


def test_prompts_of_every_kind(server):
    texts = ["one", "twenty-two", "3"]
    alone = [complete(server, prompt=text)["choices"][0]["text"] for text in texts]
    ids = [list(text.encode()) for text in texts]
    for prompts in (texts, ids):
        choices = complete(server, prompt=prompts)["choices"]
        assert [c["text"] for c in choices] == alone
        assert [c["index"] for c in choices] == [0, 1, 2]
    assert complete(server, prompt=ids[1])["choices"][0]["text"] == alone[1]
    assert complete(server, prompt="")["usage"]["prompt_tokens"] == 1
    several = complete(server, prompt=texts[:2], n=2)["choices"]
    assert [c["index"] for c in several] == [0, 1, 2, 3]
    assert several[0]["text"] == alone[0] != several[1]["text"]
    assert several[2]["text"] == alone[1]


@pytest.mark.parametrize("extra", [{}, {"echo": True, "logprobs": 2}, {"n": 2}, {"stop": "e"}])
def test_a_stream_is_the_whole_in_parts(server, extra):
    body = {"prompt": "naïve 𝄞 text", "max_tokens": 30} | extra
    whole, parts = complete(server, **body), events(server, "/v1/completions", **body)
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in parts if p["choices"][0]["index"] == choice["index"]]
        assert "".join(p["text"] for p in mine) == choice["text"]
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [x for p in mine for x in p["logprobs"][name]] == values
    assert {p["id"] for p in parts} == {parts[0]["id"]}
    assert all("usage" not in p for p in parts)


def test_usage_at_the_end_of_a_stream(server):
    options = {"stream_options": {"include_usage": True}, "prompt": "abc", "max_tokens": 5}
    parts = events(server, "/v1/completions", **options)
    assert all(p["usage"] is None for p in parts[:-1])
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 5


def test_scores_of_prompt_and_reply(server):
    text = "ab é𝄞 cd"
    found = complete(server, prompt=text, max_tokens=4, echo=True, logprobs=3)["choices"][0]
    scores, ids = found["logprobs"], list(text.encode())
    count = len(ids) + 4
    assert all(len(values) == count for values in scores.values())
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    assert found["text"].startswith(text)
    assert scores["tokens"][:3] == ["a", "b", " "]
    assert scores["tokens"][3:5] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert scores["text_offset"][:10] == [0, 1, 2, 3, 3, 4, 4, 4, 4, 5]
    model = server.engine.model
    with torch.inference_mode():
        log = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for i in range(1, len(ids)):
        assert scores["token_logprobs"][i] == pytest.approx(float(log[i - 1, ids[i]]), abs=1e-4)
        top = scores["top_logprobs"][i]
        assert 3 <= len(top) <= 4
        assert max(top.values()) == pytest.approx(float(log[i - 1].max()), abs=1e-4)
    only = complete(server, prompt=text, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert only["text"] == text
    assert only["finish_reason"] == "length"
    assert only["logprobs"]["token_logprobs"] == scores["token_logprobs"][: len(ids)]
    reply = complete(server, prompt=text, max_tokens=4, logprobs=3)["choices"][0]["logprobs"]
    # logits of all rows of a prompt round differently from those of the last row alone
    assert reply["token_logprobs"] == pytest.approx(scores["token_logprobs"][len(ids) :], abs=1e-5)
    assert reply["text_offset"][0] == 0


def test_a_chat(server):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    body = FIXED | {"messages": messages, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    found = server.post("/v1/chat/completions", **body)
    assert found["object"] == "chat.completion"
    (choice,) = found["choices"]
    assert choice["message"]["role"] == "assistant"
    listed = choice["logprobs"]["content"]
    assert len(listed) == 8
    assert (
        bytes(b for e in listed for b in e["bytes"] or []).decode(errors="replace")
        == (choice["message"]["content"])
    )
    assert all(len(e["top_logprobs"]) == 2 for e in listed)
    parts = events(server, "/v1/chat/completions", **body)
    assert parts[0]["object"] == "chat.completion.chunk"
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in parts)
    assert text == choice["message"]["content"]
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    shown = server.post("/tokenize", messages=messages)
    assert found["usage"]["prompt_tokens"] == shown["count"]
    rendered = server.post("/detokenize", tokens=shown["tokens"])["text"]
    assert rendered == "system\nBe kind.\nuser\nHello\nassistant\n"
    ended = server.post(
        "/v1/chat/completions", **body | {"logit_bias": {"258": 100}, "max_tokens": 50}
    )
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["message"]["content"] == ""


def test_a_second_turn_finds_the_first(server):
    system = {"role": "system", "content": "x" * 300}
    body = FIXED | {"max_tokens": 40}
    turns = [system, {"role": "user", "content": "first " * 40}]
    first = server.post("/v1/chat/completions", messages=turns, **body)
    time.sleep(0.5)
    other = server.post(
        "/v1/chat/completions",
        messages=[system, {"role": "user", "content": "something else"}],
        **body,
    )
    assert 300 <= other["usage"]["prompt_tokens_details"]["cached_tokens"] <= 330
    turns += [first["choices"][0]["message"], {"role": "user", "content": "second"}]
    turns[2] = {"role": "assistant", "content": turns[2]["content"]}
    second = server.post("/v1/chat/completions", messages=turns, **body)
    known = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert known >= first["usage"]["prompt_tokens"] // 16 * 16


def test_models_and_tokens(server):
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["id"] == "small"
    assert server.http.get("/v1/models/small").json() == model
    assert server.http.get("/v1/models/none").status_code == 404
    found = server.post("/tokenize", prompt="añb")
    assert found == {"tokens": list("añb".encode()), "count": 4}
    assert server.post("/detokenize", tokens=found["tokens"]) == {"text": "añb"}
    assert server.http.get("/health").json() == {"status": "ok"}
    text = server.http.get("/metrics").text
    assert 'cumulant_slots{model="small"} 4.0' in text
    assert "cumulant_first_token_seconds_bucket" in text
    assert 'cumulant_prompt_tokens_total{model="small"}' in text


def test_stops_cut_scores_too(server):
    body = {"prompt": "Once upon", "max_tokens": 60, "logprobs": 1}
    free = complete(server, **body)["choices"][0]
    letter = next(c for c in free["text"][12:] if c.isascii() and c.isprintable())
    for stream in (False, True):
        if stream:
            parts = events(server, "/v1/completions", **body, stop=letter)
            choices = [p["choices"][0] for p in parts]
            tokens = [t for c in choices for t in c["logprobs"]["tokens"]]
        else:
            tokens = complete(server, **body, stop=letter)["choices"][0]["logprobs"]["tokens"]
        assert letter not in tokens
        assert free["logprobs"]["tokens"][: len(tokens)] == tokens


def test_several_models(make_server):
    both = make_server({"one": build(), "two": build("softmax")})
    names = [m["id"] for m in both.http.get("/v1/models").json()["data"]]
    assert names == ["one", "two"]
    body = {"prompt": "abc", "seed": 1}
    texts = {n: both.post("/v1/completions", model=n, **body)["choices"][0]["text"] for n in names}
    assert texts["one"] != texts["two"]
    assert both.post("/v1/completions", 400, **body)["error"]["param"] == "model"
    over = both.post("/v1/completions", 400, model="two", prompt="a" * 600)
    assert "limited to 512 tokens" in over["error"]["message"]


def test_keys_limits_and_the_queue(make_server):
    limits = Limits(keys=("secret", "other"), body_bytes=2000, prompt_tokens=100, max_tokens=10**6)
    guarded = make_server({"small": build()}, limits=limits, slots=1, most_waiting=1)
    assert guarded.http.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        response = guarded.http.get("/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert guarded.http.get("/metrics", headers=headers).status_code == 401
    guarded.http.headers["Authorization"] = "Bearer other"
    assert guarded.http.get("/v1/models").status_code == 200
    large = guarded.http.post("/v1/completions", json={"prompt": "x" * 3000})
    assert large.status_code == 413
    chunks = guarded.http.post("/v1/completions", content=(b"x" * 500 for _ in range(9)))
    assert chunks.status_code == 413
    assert "100" in guarded.post("/v1/completions", 400, prompt="x" * 200)["error"]["message"]
    endless = {"prompt": "a", "max_tokens": 10**6, "stream": True, "logit_bias": {"256": -100}}
    with guarded.http.stream("POST", "/v1/completions", json=endless) as first:
        lines = first.iter_lines()
        assert next(lines).startswith("data:")
        with guarded.http.stream("POST", "/v1/completions", json=endless):
            refused = guarded.http.post("/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
    # both clients have gone, so the next one's turn comes
    wait_until(lambda: guarded.engine.counters.rows == 0 and not len(guarded.engine._waiting))
    assert guarded.post("/v1/completions", prompt="a", max_tokens=2)["choices"]


def test_a_client_that_goes_frees_its_slot(make_server):
    one = make_server({"small": build()}, slots=1, limits=Limits(max_tokens=10**6))
    body = {"prompt": "a", "max_tokens": 10**6, "logit_bias": {"256": -100}}
    with pytest.raises(Exception, match="timed out"):
        one.http.post("/v1/completions", json=body, timeout=0.5)
    assert one.post("/v1/completions", prompt="b", max_tokens=2)["choices"]
    slow = make_server({"small": build()}, limits=Limits(max_tokens=10**6, timeout=0.3))
    assert slow.post("/v1/completions", 504, **body)["error"]["code"] == "timeout"


def test_pings_while_a_long_prompt_is_read(make_server):
    patient = make_server({"small": build()}, limits=Limits(ping=0.02))
    body = {"prompt": list(range(200)) * 50, "max_tokens": 1, "stream": True}
    with patient.http.stream("POST", "/v1/completions", json=body) as response:
        lines = list(response.iter_lines())
    assert ": ping" in lines
    assert lines[-2] == "data: [DONE]"


def test_failures_in_the_engine_are_answered(server, monkeypatch):
    from cumulant.serving.reading import Reading

    def fail(self, *arguments):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Reading, "_advance", fail)
    body = {"prompt": "never seen before, and long enough", "max_tokens": 2}
    found = server.post("/v1/completions", 500, **body)
    assert "secret" not in json.dumps(found)
    parts = events(server, "/v1/completions", **body)
    assert parts[-1]["error"]["code"] == "internal_error"
    monkeypatch.undo()
    assert server.post("/v1/completions", **body)["choices"]


def test_many_clients_at_once_get_their_own(server):
    def ask(i):
        body = {"prompt": f"client {i % 5} says", "max_tokens": 20, "n": 1 + i % 2}
        return [c["text"] for c in complete(server, **body)["choices"]]

    wanted = {i: ask(i) for i in range(10)}
    failures = []

    def work(n):
        for k in range(4):
            i = (n * 3 + k) % 10
            if ask(i) != wanted[i]:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not math.isnan(server.engine.counters.seconds_busy)


def test_health_while_loading(make_server, monkeypatch):
    go, warm_up = threading.Event(), Engine._warm_up

    def wait(engine):
        go.wait(30)
        warm_up(engine)

    monkeypatch.setattr(Engine, "_warm_up", wait)
    server = make_server({"small": build()})
    response = server.http.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "loading"})
    go.set()
    assert server.post("/v1/completions", prompt="a", max_tokens=1)["choices"]  # it has waited
    assert server.http.get("/health").json() == {"status": "ok"}
