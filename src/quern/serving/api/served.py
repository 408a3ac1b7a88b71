"""The models of a server, by name, and requests read beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from fastapi import Request

from quern.checkpoint.panics import panics_as_errors
from quern.serving.api.errors import RequestError
from quern.serving.model import ServedModel
from quern.serving.models import Models

T = TypeVar("T")
_readers = ThreadPoolExecutor(2, "quern-reader")


async def in_thread(read: Callable[[], T]) -> T:
    """What ``read`` makes of a request (its tokens, its grammar), in a thread: answers of others go on meanwhile.

    Two at a time, since a text takes many times its size while it is tokenized.
    """

    def careful() -> T:
        with panics_as_errors():
            return read()

    return await asyncio.get_running_loop().run_in_executor(_readers, careful)


async def model_for(request: Request, name: str) -> ServedModel:
    """The model that a request names; the first one where it names none. Raises ``RequestError`` for another."""
    models = cast(Models, request.app.state.models)
    if name and name not in models.names():
        known = ", ".join(models.names())
        raise RequestError(404, f"there is no model {name!r}; served are: {known}", "model", "model_not_found")
    return await models.get(name or models.names()[0])
