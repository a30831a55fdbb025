"""A server in a thread, for real clients over a real socket."""

import socket
import threading

import pytest

pytest.importorskip("fastapi")

import httpx
import uvicorn

from cumulant.serving import Engine
from cumulant.serving.http.app import make_app
from cumulant.serving.http.service import Limits, Served, Service
from cumulant.serving.library import StateLibrary

from .common import PIECE, build, chat_tokenizer


class Running:
    """A server at a free port of this machine."""

    def __init__(self, models, limits=None, folder=None, state_limit=2**30, **options):
        self.service = Service({}, limits or Limits())
        for name, model in models.items():
            grows = "full_attention" in model.config.layer_types
            defaults = {"piece": PIECE, "threads": 1, "room": 512 if grows else None, "slots": 4}
            tokenizer = options.pop("tokenizer", None) or chat_tokenizer()
            engine = Engine(model, tokenizer, **defaults | options)
            library = StateLibrary(model, engine.piece, engine.store, folder, state_limit)
            self.service.models[name] = Served(name, engine, library)
            engine.start()
        self.engine = next(iter(self.service.models.values())).engine
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(make_app(self.service), log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, daemon=True
        )
        self._thread.start()
        listener.listen(64)
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def post(self, path, status=200, **body):
        response = self.http.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def upload(self, data):
        headers = {"Content-Type": "application/octet-stream"}
        return self.http.post("/v1/states/upload", content=data, headers=headers)

    def close(self):
        if not self._thread.is_alive():
            return
        self.http.close()
        for served in self.service.models.values():
            served.engine.stop(drain=False, timeout=30)
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        for served in self.service.models.values():
            served.library.close()


@pytest.fixture(scope="session")
def server():
    running = Running({"small": build("taylor")})
    yield running
    running.close()


@pytest.fixture
def make_server():
    started = []

    def make(models, **options):
        started.append(Running(models, **options))
        return started[-1]

    yield make
    for running in started:
        running.close()
