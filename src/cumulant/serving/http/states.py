"""/v1/states: texts that are read once and asked many times."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from ..library import Document, Entry, UnknownState
from ..requests import Read, Request
from ..sampling import SamplingOptions
from ..snapshots import Snapshot
from .errors import ApiError, Json
from .replies import while_connected
from .schema import ForkBody, StateBody
from .service import Served, Service, client_of

Start = tuple[Snapshot, int]


class Beginning:
    """A document that a request goes on from."""

    def __init__(self, document: Document, exact: bool):
        self._document, self._exact = document, exact
        self.tokens: list[int] = document.tokens[0].tolist()

    def start(self, *, more: bool) -> Start | None:
        """The state to begin from; more: the request has further tokens."""
        count = len(self.tokens)
        if not more or self._exact:
            return self._document.end, count
        border = self._document.border
        return None if border is None else (border, int(border.state.position.max()))


def find_state(served: Served, name: str | None) -> Beginning | None:
    """The document of that id, if the request names one."""
    if name is None:
        return None
    return Beginning(served.library.get(name), served.library.exact)


def _shown(served: Served, entry: Entry) -> dict[str, Any]:
    return {"object": "state", "model": served.name} | asdict(entry)


def _find(service: Service, name: str) -> Served:
    """The model that has a state of this id."""
    for served in service.models.values():
        try:
            served.library.entry(name)
        except UnknownState:
            continue
        return served
    raise UnknownState(name)


async def read_document(
    service: Service, body: StateBody, http: HttpRequest
) -> tuple[Served, Entry, int]:
    """Read a text and keep its state; and how many tokens of it were known."""
    served = service.model(body.model)
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "input: expected a text or tokens here, or messages, one of them")

    def read_tokens() -> tuple[Beginning | None, list[int]]:
        begin = find_state(served, body.state_id)
        if body.messages is not None:
            return begin, served.encode_chat([m.plain() for m in body.messages], answer=False)[0]
        text = body.input
        return begin, served.encode(text) if isinstance(text, str) else list(text or ())

    begin, ids = await run_in_threadpool(read_tokens)
    tokens = (*(begin.tokens if begin else ()), *ids)
    request = Request(
        tokens,
        SamplingOptions(max_tokens=0),
        start=begin.start(more=True) if begin else None,
        client=client_of(http),
        keep_states=True,
    )

    async def read() -> Read:
        async with service.answers(served, [request]) as answers:
            async for tagged in answers.events():
                if tagged is not None and isinstance(tagged[1], Read):
                    found = tagged[1]
        return found

    found = await while_connected(http, read(), service.limits.timeout)
    border = None if found.border is None else found.border[0]
    document = Document(torch.tensor([tokens]), border, found.end)
    entry = await run_in_threadpool(served.library.add, document)
    return served, entry, found.cached_tokens


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/states")

    @routes.post("", status_code=201)
    async def create(body: StateBody, http: HttpRequest) -> Any:
        served, entry, cached = await read_document(service, body, http)
        return Json(_shown(served, entry) | {"cached_tokens": cached}, 201)

    @routes.get("")
    async def listed() -> Any:
        def collect() -> list[dict[str, Any]]:
            return [_shown(s, e) for s in service.models.values() for e in s.library.entries()]

        return Json({"object": "list", "data": await run_in_threadpool(collect)})

    @routes.post("/upload", status_code=201)
    async def upload(http: HttpRequest, model: str | None = None) -> Any:
        served = service.model(model)
        if http.headers.get("content-type") != "application/octet-stream":  # no form of a web page
            raise ApiError(415, "send the file with Content-Type: application/octet-stream")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            with path.open("wb") as file:
                async for chunk in http.stream():
                    await run_in_threadpool(file.write, chunk)
            entry = await run_in_threadpool(served.library.restore, path)
        return Json(_shown(served, entry), 201)

    @routes.get("/{name}")
    async def one(name: str) -> Any:
        served = _find(service, name)
        return Json(_shown(served, served.library.entry(name)))

    @routes.get("/{name}/file")
    async def download(name: str) -> Any:
        served = _find(service, name)
        data = await run_in_threadpool(served.library.dump, name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    @routes.post("/{name}/fork", status_code=201)
    async def fork(name: str, body: ForkBody | None = None) -> Any:
        served = _find(service, name)
        entry = await run_in_threadpool(served.library.fork, name)
        return Json(_shown(served, entry), 201)

    @routes.delete("/{name}")
    async def delete(name: str) -> Any:
        served = _find(service, name)
        await run_in_threadpool(served.library.delete, name)
        return Json({"id": name, "object": "state", "deleted": True})

    return routes
