"""The application: protocols, and what stands before all of them."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, HTTPException
from sse_starlette.sse import SendTimeoutError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import quern
from quern.serving.api import beside, chat, completions, embeddings, messages, responses
from quern.serving.api.errors import RequestError, add_handlers, response
from quern.serving.models import Models

LARGEST_BODY = 16 << 20
"""Bytes of a request."""
MOST_VALUES = 1 << 20
"""Commas and opening brackets of a request: as Python objects, values of a few bytes take fifty times as much."""
MOST_HEADERS = 256
PATIENCE = 60.0
"""Seconds that a request has to arrive as a whole."""
OPEN = ("/", "/health")
"""Paths that need no key: they tell nothing of what is asked."""


def make_app(
    models: Models, key: str | None = None, largest: int = LARGEST_BODY, patience: float = PATIENCE
) -> FastAPI:
    """Serves ``models``; with ``key`` only those who give it. ``patience``: seconds in which a request has to arrive."""

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
    app.add_middleware(Gate, key=key, largest=largest, patience=patience)
    return app


class Gate:
    """Turns away who has no key, and bodies that are too large or too slow, before anything of them is read."""

    def __init__(self, app: ASGIApp, key: str | None, largest: int, patience: float = PATIENCE) -> None:
        self._app, self._largest, self._patience = app, largest, patience
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
        if len(scope["headers"]) > MOST_HEADERS:
            refusal = RequestError(431, f"a request may have {MOST_HEADERS} headers at most")
            await response(path, refusal)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._largest:
            await response(path, RequestError(413, self._too_large))(scope, receive, send)
            return
        with suppress(SendTimeoutError):  # a client that does not read: its connection is closed
            await self._app(scope, self._guarded(receive), send)

    def _guarded(self, receive: Receive) -> Receive:
        """``receive`` until the body is whole: then it waits for the client to go, for as long as the answer takes."""
        deadline = asyncio.get_running_loop().time() + self._patience
        seen, values, whole = 0, 0, False

        async def guarded() -> Message:
            nonlocal seen, values, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"a request has to arrive within {self._patience:g} s") from None
            body = message.get("body", b"")
            whole = not message.get("more_body", False)
            seen += len(body)
            values += sum(body.count(mark) for mark in (b",", b"[", b"{"))
            if seen > self._largest:
                raise HTTPException(413, self._too_large)
            if values > MOST_VALUES:
                raise HTTPException(413, f"a request may have {MOST_VALUES} values at most")
            return message

        return guarded

    @property
    def _too_large(self) -> str:
        return f"a request may have {self._largest} bytes at most"

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        assert self._key is not None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given.strip(), self._key)
