"""The application: protocols, and what stands before all of them."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import quern
from quern.serving.api import beside, chat, completions, embeddings, messages, responses
from quern.serving.api.errors import RequestError, add_handlers, response
from quern.serving.models import Models

LARGEST_BODY = 16 << 20
"""Bytes of a request."""
OPEN = ("/", "/health")
"""Paths that need no key: they tell nothing of what is asked."""


def make_app(models: Models, key: str | None = None, largest: int = LARGEST_BODY) -> FastAPI:
    """Serves ``models``; with ``key`` only those who give it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await models.get(models.names()[0])
        yield
        await models.close()

    app = FastAPI(title="quern", version=quern.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.models = models
    for routes in (chat, completions, embeddings, responses, messages, beside):
        app.include_router(routes.router)
    add_handlers(app)
    app.add_middleware(Gate, key=key, largest=largest)
    return app


class _TooLargeError(Exception):
    pass


class Gate:
    """Turns away who has no key, and bodies that are too large, before anything of them is read."""

    def __init__(self, app: ASGIApp, key: str | None, largest: int) -> None:
        self._app, self._largest = app, largest
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        if self._key is not None and path not in OPEN and not self._known(headers):
            refusal = RequestError(401, "give the server's key: Authorization: Bearer KEY", code="invalid_api_key")
            await response(path, refusal)(scope, receive, send)
            return
        too_large = RequestError(413, f"a request may have {self._largest} bytes at most")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._largest:
            await response(path, too_large)(scope, receive, send)
            return
        seen, begun = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._largest:
                raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLargeError:
            if not begun:
                await response(path, too_large)(scope, receive, send)

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        assert self._key is not None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given.strip(), self._key)
