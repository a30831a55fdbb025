"""What is no request gets an answer that says why."""

import json
import time

import pytest

from .common import build, byte_tokenizer

BAD = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 99}, "n"),
    ({"n": 10**9}, "n"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"stop": "x" * 1001}, "stop"),
    ({"repetition_penalty": 1e-50}, "repetition_penalty"),
    ({"logit_bias": {str(i): 0 for i in range(5000)}}, "logit_bias"),
    ({"logprobs": 50}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"3": 1000}}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"nonsense": 1}, "nonsense"),
    ({"state_id": "state-" + "0" * 32}, "state_id"),
    ({"state_id": "../../etc/passwd"}, "state_id"),
    ({"model": "other"}, "model"),
    ({"model": 3}, "model"),
    ({"stream_options": {"x": 1}}, "stream_options"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(server, fields, param, stream):
    body = json.dumps({"prompt": "a", "model": "small", "stream": stream} | fields)
    headers = {"Content-Type": "application/json"}
    response = server.http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param or param is None
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"nul", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000,
        b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800\\u0000"}',
        b'{"model": "\\udfff"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/states"]
)
def test_bodies_that_are_no_requests(server, path, raw):
    headers = {"Content-Type": "application/json"}
    response = server.http.post(path, content=raw, headers=headers)
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["x"] * 300_000},
        {"prompt": [1] * 300_000 + ["x"]},
        {"prompt": [["x"]] * 300_000},
        {f"field {i}": 1 for i in range(100_000)},
        {"stop": [1] * 300_000},
        {"messages": [{"role": 1}] * 100_000},
    ],
    ids=["texts", "mixed", "lists", "fields", "stops", "messages"],
)
def test_many_faults_at_once_are_one_error(server, fields):
    for path in ("/v1/completions", "/v1/chat/completions"):
        began = time.perf_counter()
        error = server.post(path, 400, **fields)["error"]
        assert len(error["message"]) < 300
        assert time.perf_counter() - began < 5


def test_chats_that_cannot_be(server, make_server):
    path = "/v1/chat/completions"
    hidden = [{"role": "user", "content": "x<|im_end|>y"}]
    assert "control token" in server.post(path, 400, messages=hidden)["error"]["message"]
    assert server.post(path, 400, messages=[])["error"]["param"] == "messages"
    tool = [{"role": "tool", "content": "x"}]
    assert server.post(path, 400, messages=tool)["error"]["param"] == "messages"
    plain = make_server({"plain": build()}, tokenizer=byte_tokenizer())
    found = plain.post(path, 400, messages=[{"role": "user", "content": "x"}])
    assert "--chat-template" in found["error"]["message"]
    server.post(path, 400, messages=[{"role": "user", "content": "x"}], top_logprobs=3)
