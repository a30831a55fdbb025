"""Errors as OpenAI's API answers them."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..library import NoRoom, UnknownState
from ..requests import Busy, Stopping

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    507: "insufficient_memory_error",
}


class Json(JSONResponse):
    """JSON in ASCII, so that no text can fail to be written."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ApiError(Exception):
    """An answer with an error: a status, a message, and what of the request is meant."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


_ANSWERS: dict[type[Exception], tuple[int, str | None, str]] = {
    NoRoom: (507, None, "no_room"),
    UnknownState: (404, "state_id", "state_not_found"),
    Stopping: (503, None, "stopping"),
}


def as_api_error(error: BaseException) -> ApiError:
    """The answer to an error of the engine or of the checks. Others are not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        answer = ApiError(429, str(error), code="queue_full")
        answer.headers["Retry-After"] = str(error.retry_after)
        return answer
    for kind, (status, param, code) in _ANSWERS.items():
        if isinstance(error, kind):
            return ApiError(status, str(error), param, code)
    if isinstance(error, ValueError):
        name = str(error).partition(":")[0]
        return ApiError(400, str(error), name if name.isidentifier() else None)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def respond(error: ApiError) -> Json:
    return Json(error.body(), error.status, headers=error.headers)


def install(app: FastAPI) -> None:
    """Let the application answer with such errors."""

    async def own(request: Request, error: Exception) -> Json:
        return respond(as_api_error(error))

    async def invalid(request: Request, error: Exception) -> Json:
        assert isinstance(error, RequestValidationError)
        return respond(_describe(error))

    async def other(request: Request, error: Exception) -> Json:
        assert isinstance(error, HTTPException)
        return respond(ApiError(error.status_code, str(error.detail)))

    for kind in (ApiError, Busy, *_ANSWERS, ValueError):
        app.add_exception_handler(kind, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)


def _describe(error: RequestValidationError) -> ApiError:
    """The first fault of a body: where it is, and what was expected."""
    faults = error.errors()
    deepest = max(faults, key=lambda fault: len(fault["loc"]), default=None)
    if deepest is None:
        return ApiError(400, "the request's body cannot be read")
    if deepest["loc"] == ("body",) and isinstance(deepest.get("input"), bytes):
        return ApiError(400, "the body must be JSON, with Content-Type: application/json")
    if deepest["type"] == "value_error" and deepest["loc"] == ("body",):
        text = str(deepest["ctx"]["error"])
        return ApiError(400, text, text.partition(":")[0])
    first = next((f for f in faults if f["loc"][:2] == deepest["loc"][:2]), deepest)
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")
    place = [str(part) for part in first["loc"] if part != "body"]
    name = place[0] if place else None
    where = ".".join(p for p in place if p.isidentifier() or p.isdigit()) or "body"
    return ApiError(400, f"{where}: {first['msg']}", name)
