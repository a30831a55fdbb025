"""The application: routes of all endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, Response
from starlette.concurrency import run_in_threadpool

from ... import __version__
from . import completions, errors, states
from .errors import ApiError, Json
from .guard import Guard
from .metrics import Metrics
from .schema import DetokenizeBody, TokenizeBody
from .service import Service


def make_app(service: Service) -> FastAPI:
    """The application for models whose engines run."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.connect()
        yield

    app = FastAPI(
        title="Cumulant", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url=None,
    )  # fmt: skip
    service.metrics = Metrics(service)
    errors.install(app)
    app.add_middleware(Guard, limits=service.limits)
    app.include_router(completions.router(service))
    app.include_router(states.router(service))
    app.include_router(_page())
    app.include_router(_models(service))
    app.include_router(_tokens(service))
    app.include_router(_health(service))
    return app


def _page() -> APIRouter:
    routes = APIRouter()
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @routes.get("/")
    async def page() -> Any:
        return HTMLResponse(text)

    return routes


def _models(service: Service) -> APIRouter:
    routes = APIRouter()

    def shown(name: str) -> dict[str, Any]:
        served = service.model(name)
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "cumulant",
            "context": served.engine.room,
            "piece": served.engine.piece,
            **served.state_sizes,
        }

    @routes.get("/v1/models")
    async def listed() -> Any:
        return Json({"object": "list", "data": [shown(name) for name in service.models]})

    @routes.get("/v1/models/{name:path}")
    async def one(name: str) -> Any:
        return Json(shown(name))

    return routes


def _tokens(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Any:
        served = service.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: expected a text here, or messages, one of them", "prompt")
        if body.messages is not None:
            plain = [m.plain() for m in body.messages]
            tokens = (await run_in_threadpool(served.encode_chat, plain))[0]
        else:
            tokens = await run_in_threadpool(served.encode, body.prompt or "")
        return Json({"tokens": tokens, "count": len(tokens)})

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Any:
        served = service.model(body.model)
        served.check_tokens(body.tokens, "tokens")
        return Json({"text": served.decode(body.tokens)})

    return routes


def _health(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Any:
        ready = all(served.engine.ready.is_set() for served in service.models.values())
        state = "stopping" if service.draining else "ok" if ready else "loading"
        dead = [n for n, served in service.models.items() if not served.engine.running]
        if dead and not service.draining:
            state = "failed"
        return Json({"status": state}, 200 if state == "ok" else 503)

    @routes.get("/metrics")
    async def metrics() -> Any:
        assert service.metrics is not None
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return routes
