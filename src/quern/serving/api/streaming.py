"""Server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent


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
    return EventSourceResponse(events(), sep="\n", headers=headers, client_close_handler_callable=gone)
