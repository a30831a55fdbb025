"""`cumulant serve` as a process: what it prints, its mistakes, signals, and what survives."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from cumulant import __main__ as entry
from cumulant.serving.memory import parse_size, plan_memory

from .common import CHATML, build, byte_tokenizer

ARGUMENTS = ["--port", "0", "--threads", "1", "--memory", "3GiB"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "small"
    build().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


class Process:
    def __init__(self, *arguments):
        command = [sys.executable, "-m", "cumulant", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"listening at (http://\S+)", line):
                self.http = httpx.Client(base_url=found[1], timeout=60, trust_env=False)
                return
        raise AssertionError("".join(self.lines))

    def post(self, path, **body):
        return self.http.post(path, json=body).json()

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.lines += self.process.stdout.readlines()
        self.close()
        return code

    def close(self):
        self.process.kill()
        self.process.wait(60)
        self.process.stdout.close()
        self.http.close()


@pytest.mark.slow
def test_it_serves_stops_and_continues(folder, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    options = [*ARGUMENTS, "--state-dir", tmp_path / "states", "--chat-template", template]
    first = Process(folder, *options)
    text = "".join(first.lines)
    assert re.search(r"small: weights .* 16 slots .* contexts of any length; snapshots", text)
    assert re.search(r"memory: 3\.00 GiB at most", text)
    state = first.post("/v1/states", input="A long document. " * 30)
    body = {"prompt": "Question?", "state_id": state["id"], "seed": 4, "max_tokens": 20}
    wanted = first.post("/v1/completions", **body)["choices"][0]["text"]
    messages = [{"role": "user", "content": "x"}]
    assert first.post("/v1/chat/completions", messages=messages, max_tokens=2)["choices"]
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Process(folder, *options)
    try:
        found = second.post("/v1/completions", **body)
        assert found["choices"][0]["text"] == wanted
        known = found["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert known >= state["tokens"] // 128 * 128
        endless = {"prompt": "a", "max_tokens": 3000, "stream": True, "logit_bias": {"256": -100}}
        with second.http.stream("POST", "/v1/completions", json=endless) as response:
            lines = response.iter_lines()
            next(lines)
            second.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            with httpx.Client(base_url=second.http.base_url, trust_env=False) as other:
                assert other.get("/health").status_code == 503
                assert other.post("/v1/completions", json={"prompt": "b"}).status_code == 503
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert second.process.wait(60) == 0
    finally:
        second.close()


@pytest.mark.slow
def test_two_processes_share_a_folder(folder, tmp_path):
    """A client that takes them in turns gets what one alone would give."""
    options = [*ARGUMENTS, "--state-dir", tmp_path]
    servers = [Process(folder, *options) for _ in range(2)]
    try:
        state = servers[0].post("/v1/states", input="A long document. " * 30)
        body = {"seed": 4, "max_tokens": 20, "logit_bias": {"256": -100}}
        texts = []
        for turn in range(4):
            server = servers[turn % 2]
            found = server.post(
                "/v1/completions", prompt=f"Turn {turn}", state_id=state["id"], **body
            )
            texts.append(found["choices"][0]["text"])
            state = server.post("/v1/states", input=texts[-1], state_id=state["id"])
        ids = [
            {s["id"] for s in server.http.get("/v1/states").json()["data"]} for server in servers
        ]
        assert ids[0] == ids[1]
        assert len(ids[0]) == 5
        alone = servers[0].post(
            "/v1/completions",
            prompt="A long document. " * 30 + "".join(texts[:3]) + "Turn 3",
            **body,
        )
        assert alone["choices"][0]["text"] == texts[3]
    finally:
        for server in servers:
            server.end()


@pytest.mark.slow
def test_a_second_signal_stops_at_once(folder):
    server = Process(folder, *ARGUMENTS, "--grace", "100", "--max-tokens", "1000000")
    endless = {"prompt": "a", "max_tokens": 10**6, "stream": True, "logit_bias": {"256": -100}}
    with server.http.stream("POST", "/v1/completions", json=endless) as response:
        next(response.iter_lines())
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
    server.close()


@pytest.mark.slow
def test_replies_that_take_too_long_end_with_an_error(folder):
    server = Process(folder, *ARGUMENTS, "--grace", "0.3", "--max-tokens", "1000000")
    endless = {"prompt": "a", "max_tokens": 10**6, "stream": True, "logit_bias": {"256": -100}}
    with server.http.stream("POST", "/v1/completions", json=endless) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == "stopping"
    assert server.process.wait(60) == 0
    server.close()


def test_mistakes(folder, capsys, monkeypatch):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = str(taken.getsockname()[1])
    cases = [
        ([str(folder), "--port", port], f"port: cannot listen at 127.0.0.1, port {port}"),
        ([str(folder), "--port", "70000"], "port: expected 0 to 65535"),
        ([str(folder), "--port", "0", "--host", "no.such.host.invalid"], "host: "),
        ([str(folder), "--port", "0", "--memory", "a lot"], "memory: expected a size"),
        ([str(folder), "--port", "0", "--memory", "10MiB"], "too little for 16 slots"),
        ([str(folder), "--port", "0", "--slots", "0"], "slots: expected at least 1"),
        (["missing-folder", "--port", "0"], "no model at missing-folder"),
        ([str(folder), str(folder), "--port", "0"], "two models are named small"),
        ([str(folder), "--port", "0", "--chat-template", "none.jinja"], "none.jinja"),
        ([str(folder), "--port", "0", "--bits", "8"], "--bits"),
        ([], "Missing argument 'runs'"),
    ]
    monkeypatch.setattr(entry, "keep_freed_memory", lambda: None)
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", ["cumulant", "serve", *arguments])
        with pytest.raises(SystemExit) as end:
            entry.main()
        error = capsys.readouterr().err
        assert end.value.code not in (0, None), arguments
        assert message in error, (arguments, error)
        assert len(error.strip().splitlines()) <= 4, error
    taken.close()


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5g", 3 * 2**29), ("1000", 1000), ("3kb", 3072)],
)
def test_sizes(text, size):
    assert parse_size("memory", text) == size


def test_plans_add_up():
    models = [build("taylor"), build("softmax")]
    plans = plan_memory(models, 4, 8 * 2**30, 16)
    assert sum(plan.total for plan in plans) <= 8 * 2**30
    assert plans[0].room is None
    assert plans[1].room > 10_000
    (fixed,) = plan_memory(models[1:], 4, 8 * 2**30, 16, context=100)
    assert fixed.room == 100
    with pytest.raises(ValueError, match=r"memory: 1\.00 MiB|memory: 1,?024 KiB|memory: 1 MiB"):
        plan_memory(models, 4, 2**20, 16)
