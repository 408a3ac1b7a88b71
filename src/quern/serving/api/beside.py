"""What runs beside the protocols: models, tokens, health, metrics, version, and a page to chat in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

import quern
from quern.serving.api.errors import RequestError
from quern.serving.api.fields import Body, Name, Text, Tokens
from quern.serving.api.served import in_thread, model_for
from quern.serving.metrics import CONTENT_TYPE, exposition
from quern.serving.models import Models

PAGE = Path(__file__).with_name("page.html")
router = APIRouter()


class TokenizeRequest(Body):
    """``POST /tokenize``."""

    model: Name = ""
    prompt: Text = ""
    content: Text = ""
    add_special_tokens: bool = True


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: Name = ""
    tokens: Tokens


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that can be asked for."""
    known = cast(Models, request.app.state.models)
    created = {model.name: model.created for model in known.loaded()}
    listed = [
        {"id": name, "object": "model", "created": created.get(name, 0), "owned_by": "quern"} for name in known.names()
    ]
    return {"object": "list", "data": listed}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One of them."""
    found = [one for one in (await models(request))["data"] if one["id"] == name]
    if not found:
        raise RequestError(404, f"there is no model {name!r}", "model", "model_not_found")
    return dict(found[0])


@router.post("/tokenize")
async def tokenize(request: Request, asked: TokenizeRequest) -> dict[str, Any]:
    """Token ids of a text."""
    model = await model_for(request, asked.model)
    text = asked.prompt or asked.content

    def read() -> list[int]:
        return list(model.tokenizer(text, add_special_tokens=asked.add_special_tokens)["input_ids"])

    ids = await in_thread(read) if text else []
    return {"tokens": ids, "count": len(ids), "max_model_len": model.context}


@router.post("/detokenize")
async def detokenize(request: Request, asked: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids."""
    model = await model_for(request, asked.model)
    size = model.model.vocabulary_size
    if any(not 0 <= token < size for token in asked.tokens):
        raise RequestError(400, f"tokens are numbers from 0 to {size - 1}", "tokens")
    text = await in_thread(lambda: str(model.tokenizer.decode(asked.tokens)))
    return {"prompt": text, "content": text}


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the server answers."""
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    """Of quern."""
    return {"version": quern.__version__}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """What was done, for Prometheus."""
    return Response(exposition(cast(Models, request.app.state.models).loaded()), media_type=CONTENT_TYPE)


@router.get("/", response_class=HTMLResponse)
async def page() -> str:
    """A page to chat in."""
    return PAGE.read_text("utf-8")
