"""OpenAI's embeddings: vectors of texts or token ids."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from quern.serving.api.errors import RequestError, as_request_error
from quern.serving.api.fields import Body, Text
from quern.serving.api.served import model_for
from quern.serving.embedding import Vectors, scaled

PATH = "/v1/embeddings"
MOST_TEXTS = 2048
MOST_TOKENS = 300_000
"""Of all texts of a request; both are OpenAI's limits."""
LOOK = 1.0
"""Seconds after which it is looked whether the client is still there."""
router = APIRouter()


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``."""

    model: str = ""
    input: Text | list[int] | Annotated[list[Text | list[int]], Field(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None


@router.post(PATH, response_model=None)
async def embed(request: Request, asked: EmbeddingRequest) -> Response:
    """One vector a text, of length 1."""
    model = await model_for(request, asked.model)
    given: list[Any] = [asked.input]
    if isinstance(asked.input, list) and not all(isinstance(one, int) for one in asked.input):
        given = list(asked.input)
    if asked.dimensions is not None and asked.dimensions > model.model.hidden_size:
        raise RequestError(
            400, f"dimensions is {asked.dimensions}; this model's vectors have {model.model.hidden_size}", "dimensions"
        )
    texts = [model.text_to_embed(one) for one in given]
    tokens = sum(len(text) for text in texts)
    if tokens > MOST_TOKENS:
        raise RequestError(400, f"the texts have {tokens} tokens; a request may have {MOST_TOKENS}", "input")
    future = asyncio.wrap_future(model.scheduler.embed(texts, model.pooling))
    try:
        while not (await asyncio.wait([future], timeout=LOOK))[0]:
            if await request.is_disconnected():
                return Response(status_code=499)
        if future.cancelled():
            raise RequestError(503, "the server ends")
        vectors = future.result()
    except Exception as error:
        raise as_request_error(error) from error
    finally:
        future.cancel()
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    data = [
        {"object": "embedding", "index": place, "embedding": one}
        for place, one in enumerate(_written(scaled(vectors, asked.dimensions), asked.encoding_format))
    ]
    return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


def _written(vectors: Vectors, form: str) -> list[Any]:
    if form == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    return list(vectors.tolist())
