"""Who may ask, and how much a request may hold; checked before anything is read."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from .errors import ApiError, as_api_error, respond
from .service import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

log = logging.getLogger("cumulant.serving")
UPLOAD = "/v1/states/upload"
OPEN = frozenset({"/", "/health"})  # for everybody


class Guard:
    """Middleware: the key, compared in constant time, and the size of the body.

    Errors that nothing else has answered end here, with a line in the log.
    """

    def __init__(self, app: Any, limits: Limits):
        self._app, self._limits = app, limits
        self._keys = [key.encode() for key in limits.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await respond(refusal)(scope, receive, send)
            return
        read, started = 0, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most(scope):
                raise HTTPException(413, self._too_large(scope).message)
            return message

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except Exception as error:
            log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if started:
                raise
            await respond(as_api_error(error))(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._keys and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            token = given[7:] if given[:7].lower() == b"bearer " else b""
            # every key is compared, so that the time tells nothing
            if sum(hmac.compare_digest(token, key) for key in self._keys):
                scope.setdefault("state", {})["key"] = token.decode("latin-1")
            else:
                answer = ApiError(
                    401,
                    "the key is missing or wrong; send it as: Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
                answer.headers["WWW-Authenticate"] = "Bearer"
                return answer
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most(scope):
            return self._too_large(scope)
        return None

    def _most(self, scope: Scope) -> int:
        upload = scope["path"] == UPLOAD
        return self._limits.upload_bytes if upload else self._limits.body_bytes

    def _too_large(self, scope: Scope) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most(scope):,} bytes")
