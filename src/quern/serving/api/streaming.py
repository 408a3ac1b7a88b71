"""Answers as they are written, by server-sent events, and whole ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent

from quern.serving.api.errors import RequestError

T = TypeVar("T")
SLOWEST = 60.0
"""Seconds in which a client has to take what is sent; until then its answer is paused, and keeps its place."""
CLIENT_GONE = 499
"""The status, which nobody reads, of a request whose client went."""


@dataclass(frozen=True)
class Streamed:
    """One event."""

    data: str
    event: str | None = None


async def event_stream(
    opening: AbstractAsyncContextManager[Any], tell: Callable[[Any], AsyncIterator[Streamed]]
) -> EventSourceResponse:
    """A stream of what ``tell`` makes of what ``opening`` opens; it is closed when the stream ends or its reader goes.

    Opened at once, so that a request that is refused is answered as one.
    """
    stack = AsyncExitStack()
    opened = await stack.enter_async_context(opening)

    async def events() -> AsyncIterator[ServerSentEvent]:
        async with stack:
            async for one in tell(opened):
                yield ServerSentEvent(one.data, event=one.event, sep="\n")

    async def gone(message: Any) -> None:
        await stack.aclose()  # also where the reader went before anything was read

    headers = {"X-Accel-Buffering": "no"}
    return EventSourceResponse(
        events(), sep="\n", headers=headers, client_close_handler_callable=gone, send_timeout=SLOWEST
    )


async def whole_answer(
    request: Request, opening: AbstractAsyncContextManager[Any], tell: Callable[[Any], Awaitable[T]]
) -> T:
    """What ``tell`` makes of what ``opening`` opens, which is closed as soon as the client goes."""
    async with opening as opened:
        telling = asyncio.ensure_future(tell(opened))
        going = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({telling, going}, return_when=asyncio.FIRST_COMPLETED)
            if not telling.done():
                raise RequestError(CLIENT_GONE, "the client went")
            return telling.result()
        finally:
            telling.cancel()
            going.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
