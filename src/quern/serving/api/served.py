"""The models of a server, by name."""

from __future__ import annotations

from typing import cast

from fastapi import Request

from quern.serving.api.errors import RequestError
from quern.serving.model import ServedModel
from quern.serving.models import Models


async def model_for(request: Request, name: str) -> ServedModel:
    """The model that a request names; the first one where it names none. Raises ``RequestError`` for another."""
    models = cast(Models, request.app.state.models)
    if name and name not in models.names():
        known = ", ".join(models.names())
        raise RequestError(404, f"there is no model {name!r}; served are: {known}", "model", "model_not_found")
    return await models.get(name or models.names()[0])
