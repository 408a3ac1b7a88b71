"""Errors in the form of the protocol that a request speaks."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from quern.core.errors import QuernError, UserError
from quern.serving.scheduler import QueueFullError

ANTHROPIC = "/v1/messages"
_OPENAI_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
LONGEST = 2000
"""Characters of a message: what was asked may stand in it."""
log = logging.getLogger("quern.serving")


class RequestError(Exception):
    """A request that is refused."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter, self.code = status, message[:LONGEST], parameter, code


def as_request_error(error: Exception) -> RequestError:
    """What a client is told of an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(429, str(error), code="queue_full")
    if isinstance(error, UserError):
        return RequestError(400, error.message)
    if isinstance(error, QuernError):
        return RequestError(500, str(error))
    log.error("a request failed", exc_info=error)
    return RequestError(500, "the server failed at this request; its log says more")


def body(path: str, error: RequestError) -> dict[str, Any]:
    """The error as the protocol of ``path`` writes it."""
    if path.startswith(ANTHROPIC):
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    kind = _OPENAI_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    said = {"message": error.message, "type": kind, "param": error.parameter, "code": error.code}
    return {"error": said}


def response(path: str, error: RequestError) -> Response:
    """The error as an answer; in ASCII, since texts of requests in it need be no Unicode."""
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return Response(json.dumps(body(path, error)), error.status, headers, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Let ``app`` answer errors so."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:100] for part in first["loc"] if part != "body") or None
        said = first["msg"] if where is None else f"{where}: {first['msg']}"
        return response(request.url.path, RequestError(400, said, where))

    @app.exception_handler(HTTPException)
    async def foreign(request: Request, error: HTTPException) -> Response:
        return response(request.url.path, RequestError(error.status_code, str(error.detail)))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return response(request.url.path, error)

    @app.exception_handler(QuernError)
    async def known(request: Request, error: QuernError) -> Response:
        return response(request.url.path, as_request_error(error))

    @app.exception_handler(RecursionError)
    async def deep(request: Request, error: RecursionError) -> Response:
        return response(request.url.path, RequestError(400, "the request is nested too deeply"))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return response(request.url.path, as_request_error(error))
