"""Pure ASGI middleware: small limits on JSON bodies, headers that browsers heed, one log line a request."""

import contextlib
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.meters import Meters
from app.problems import render
from isthmus.wire.problems import ProblemCode, problem
from isthmus.wire.version import TENSORS_MEDIA_TYPE

log = structlog.get_logger("app.access")

_PAGES = ("/docs",)
_CLOSED = "default-src 'none'; frame-ancestors 'none'"
_PAGE = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
)


class _TooLarge(Exception):
    """More of a body arrived than is read."""


class BodyLimit:
    """Refuses JSON bodies beyond a limit before they are gathered. Tensors have limits of their own, by manifest."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-type", "").partition(";")[0].strip() == TENSORS_MEDIA_TYPE and scope["method"] == "PUT":
            await self._app(scope, receive, send)
            return
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._limit:
            await self._refuse(scope, receive, send)
            return
        received, started = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if received > self._limit and not started:
                return  # FastAPI takes what `counted` raises for a malformed body; our refusal is the answer
            started = True
            await send(message)

        with contextlib.suppress(_TooLarge):
            await self._app(scope, counted, watched)
        if received > self._limit and not started:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = render(problem(ProblemCode.BODY_TOO_LARGE, f"At most {self._limit} bytes are read here."))
        await refusal(scope, receive, send)


class SecureHeaders:
    """Tells browsers to run nothing here but the documentation's own pages, and proxies to keep nothing private."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        policy = _PAGE if scope["path"].startswith(_PAGES) else _CLOSED

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", policy)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Referrer-Policy", "no-referrer")
                headers.setdefault("X-Frame-Options", "DENY")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, headed)


class Observation:
    """One log line and one count a request: method, path, status, seconds. Never a header, a query or a body."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0  # 0: the client went away before there was an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - began
            self._meters.answered(scope, status, seconds)
            log.info("request", method=scope["method"], path=scope["path"], status=status, seconds=round(seconds, 4))
