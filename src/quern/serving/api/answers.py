"""From the scheduler's thread to the server's event loop: answers as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from quern.serving.api.errors import as_request_error
from quern.serving.request import Event, Failed, Finished, GenerationRequest, Piece
from quern.serving.scheduler import Scheduler

MOST_UNREAD = 256
"""Pieces that a client may be behind; then its answer is paused until it has read half of them."""


class Answer:
    """One request's events, in order."""

    def __init__(self, scheduler: Scheduler, request: GenerationRequest) -> None:
        """Submit it. Raises ``QueueFullError`` and ``UserError``. Belongs to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._scheduler, self._over = scheduler, False
        self._running = scheduler.submit(request, self._tell)

    def _tell(self, event: Event) -> None:
        """In the scheduler's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived, event)

    def _arrived(self, event: Event) -> None:
        self._queue.put_nowait(event)
        if self._queue.qsize() > MOST_UNREAD:
            self._running.paused = True

    async def next(self) -> Piece | Finished:
        """The next event. Raises what made it fail, as ``RequestError``."""
        event = await self._queue.get()
        if self._running.paused and self._queue.qsize() <= MOST_UNREAD // 2:
            self._running.paused = False
            self._scheduler.wake()
        self._over = not isinstance(event, Piece)
        if isinstance(event, Failed):
            raise as_request_error(event.error) from event.error
        return event

    def close(self) -> None:
        """Nobody reads on."""
        if not self._over:
            self._scheduler.cancel(self._running)


@asynccontextmanager
async def answers(scheduler: Scheduler, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Answer]]:
    """Submit requests together; those that are not finished at the end are cancelled."""
    async with AsyncExitStack() as stack:
        opened = []
        for request in requests:
            opened.append(answer := Answer(scheduler, request))
            stack.callback(answer.close)
        yield opened


async def merged(opened: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece | Finished]]:
    """Events of several answers as they come, each with its answer's place."""
    if len(opened) == 1:
        while True:
            event = await opened[0].next()
            yield 0, event
            if isinstance(event, Finished):
                return
    reading = {asyncio.ensure_future(answer.next()): place for place, answer in enumerate(opened)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=reading.__getitem__):
                place, event = reading.pop(future), future.result()
                yield place, event
                if not isinstance(event, Finished):
                    reading[asyncio.ensure_future(opened[place].next())] = place
    finally:
        for future in reading:
            future.cancel()
