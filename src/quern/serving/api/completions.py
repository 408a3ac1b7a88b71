"""OpenAI's completions: a text or token ids, continued."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from quern.serving.api.answers import answers, merged
from quern.serving.api.chat import StreamOptions, usage_of
from quern.serving.api.errors import RequestError, body
from quern.serving.api.fields import Name, ResponseFormat, SamplingFields, Several, Text, Tokens
from quern.serving.api.served import in_thread, model_for
from quern.serving.api.streaming import Streamed, event_stream, whole_answer
from quern.serving.model import Prompt, ServedModel
from quern.serving.request import FinishReason, GenerationRequest, Piece, TokenProbability, Usage

PATH = "/v1/completions"
MOST_PROMPTS = 16
router = APIRouter()


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``."""

    model: Name = ""
    prompt: Text | Tokens | Annotated[Several[Text | Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    response_format: ResponseFormat | None = None

    def prompts(self, model: ServedModel) -> list[Prompt]:
        """Each of them as tokens."""
        given: list[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not all(isinstance(one, int) for one in self.prompt):
            given = list(self.prompt)
        if len(given) * self.n > MOST_PROMPTS:
            raise RequestError(400, f"{len(given)} prompts with n = {self.n} are more than {MOST_PROMPTS} answers", "n")
        return [model.prompt_of(one) if isinstance(one, str) else model.prompt_of_ids(one) for one in given]

    def read(self, model: ServedModel) -> tuple[list[GenerationRequest], list[str]]:
        """What is asked of the model, and the text that each answer begins with."""
        grammar = None if self.response_format is None else self.response_format.grammar(model)
        found = [
            one
            for prompt in self.prompts(model)
            for one in self.requests(model, prompt, self.max_tokens, self.logprobs, grammar)
        ]
        return found, [str(model.decode(list(one.ids))) if self.echo else "" for one in found]


@router.post(PATH, response_model=None)
async def complete(request: Request, asked: CompletionRequest) -> Any:
    """Continue one text, or several."""
    model = await model_for(request, asked.model)
    requests, first = await in_thread(lambda: asked.read(model))
    reply = _Reply(model, asked, first)
    if asked.stream:
        return await event_stream(answers(model.scheduler, requests), reply.chunks)
    return await whole_answer(request, answers(model.scheduler, requests), reply.whole)


class _Reply:
    def __init__(self, model: ServedModel, asked: CompletionRequest, first: list[str]) -> None:
        self._model, self._asked, self._first = model, asked, first
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    async def whole(self, opened: Any) -> dict[str, Any]:
        """One object, once all is written."""
        texts, tokens = list(self._first), [list[TokenProbability]() for _ in opened]
        usages, reasons = [Usage(0, 0, 0)] * len(opened), ["stop"] * len(opened)
        async for place, event in merged(opened):
            if isinstance(event, Piece):
                texts[place] += event.text
                tokens[place] += event.tokens
            else:
                usages[place] = event.usage
                reasons[place] = "length" if event.reason is FinishReason.LENGTH else "stop"
        choices = [
            {"index": place, "text": text, "logprobs": self._shown(tokens[place]), "finish_reason": reasons[place]}
            for place, text in enumerate(texts)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(usages)}

    async def chunks(self, opened: Any) -> AsyncIterator[Streamed]:
        """Pieces, as they are written."""
        usages = [Usage(0, 0, 0)] * len(opened)
        for place, text in enumerate(self._first):
            if text:
                yield self._chunk(place, text)
        try:
            async for place, event in merged(opened):
                if isinstance(event, Piece):
                    yield self._chunk(place, event.text, list(event.tokens))
                else:
                    usages[place] = event.usage
                    yield self._chunk(place, "", reason="length" if event.reason is FinishReason.LENGTH else "stop")
        except RequestError as error:
            yield Streamed(json.dumps(body(PATH, error)))
            return
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield Streamed(json.dumps({**self._head, "choices": [], "usage": self._usage(usages)}))
        yield Streamed("[DONE]")

    def _chunk(
        self, place: int, text: str, tokens: list[TokenProbability] | None = None, reason: str | None = None
    ) -> Streamed:
        shown = self._shown(tokens) if tokens else None
        choice = {"index": place, "text": text, "logprobs": shown, "finish_reason": reason}
        return Streamed(json.dumps({**self._head, "choices": [choice]}, ensure_ascii=False))

    def _usage(self, usages: list[Usage]) -> dict[str, Any]:
        """Prompts count once each, however many answers they have."""
        firsts = usages[:: self._asked.n]
        total = replace(firsts[0], prompt=sum(u.prompt for u in firsts), cached=sum(u.cached for u in firsts))
        return usage_of([replace(total, written=sum(one.written for one in usages))])

    def _shown(self, tokens: list[TokenProbability]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        named = [str(self._model.tokenizer.decode([one.token])) for one in tokens]
        return {
            "tokens": named,
            "token_logprobs": [max(one.logprob, -9999.0) for one in tokens],
            "top_logprobs": [
                {str(self._model.tokenizer.decode([token])): max(value, -9999.0) for token, value in one.likeliest}
                for one in tokens
            ],
        }
