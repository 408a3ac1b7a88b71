"""OpenAI's chat completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from quern.serving.api.answers import answers, merged
from quern.serving.api.errors import RequestError, body
from quern.serving.api.fields import Body, Name, ResponseFormat, SamplingFields, Several, Text
from quern.serving.api.served import in_thread, model_for
from quern.serving.api.streaming import Streamed, event_stream, whole_answer
from quern.serving.grammar import TokenGrammar
from quern.serving.model import Prompt, ServedModel
from quern.serving.parts import Part, PartReader
from quern.serving.request import Finished, FinishReason, GenerationRequest, Piece, TokenProbability, Usage

PATH = "/v1/chat/completions"
MOST_TOOLS = 128
router = APIRouter()


class ContentPart(Body):
    """A part of a message."""

    type: Name
    text: Text | None = None


class Function(Body):
    """A tool."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """What ``tools`` lists."""

    type: Literal["function"] = "function"
    function: Function


class CalledFunction(Body):
    """A call in an earlier message."""

    name: Name
    arguments: Text = "{}"


class Call(Body):
    """A call in an earlier message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Several[ContentPart] | None = None
    name: str | None = None
    reasoning_content: Text | None = None
    tool_calls: Several[Call] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it. Raises ``RequestError`` for parts that are no text."""
        found = self.model_dump(exclude_none=True)
        found["role"] = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            for part in self.content:
                if part.type != "text" or part.text is None:
                    raise RequestError(
                        400, f"a message has a part of type {part.type!r}; this server takes text", "messages"
                    )
        found.setdefault("content", "" if self.role != "assistant" or not self.tool_calls else None)
        return found


class NamedFunction(Body):
    """A tool by name."""

    name: Name


class NamedTool(Body):
    """The tool that is to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``."""

    model: Name = ""
    messages: Annotated[Several[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[Several[Tool], Field(max_length=MOST_TOOLS)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        if self.tool_choice == "none":
            return []
        if not isinstance(self.tool_choice, NamedTool):
            return self.tools
        wanted = self.tool_choice.function.name
        found = [tool for tool in self.tools if tool.function.name == wanted]
        if not found:
            raise RequestError(400, f"tool_choice names {wanted!r}, which is not among the tools", "tool_choice")
        return found

    def grammar(self, model: ServedModel) -> Callable[[], TokenGrammar] | None:
        """What constrains the answer."""
        tools = self.offered()
        if self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool):
            if not tools:
                raise RequestError(400, "tool_choice wants a call, and there are no tools", "tool_choice")
            return model.calls({tool.function.name: tool.function.parameters or {} for tool in tools})
        return None if self.response_format is None else self.response_format.grammar(model)


@router.post(PATH, response_model=None)
async def chat(request: Request, asked: ChatRequest) -> Any:
    """Answer a conversation."""
    model = await model_for(request, asked.model)
    tools = asked.offered()

    def read() -> tuple[Prompt, list[GenerationRequest]]:
        prompt = model.conversation(
            [message.plain() for message in asked.messages],
            [tool.model_dump(exclude_none=True) for tool in tools],
            asked.chat_template_kwargs,
        )
        most = asked.max_completion_tokens or asked.max_tokens
        shown = (asked.top_logprobs or 0) if asked.logprobs else None
        return prompt, asked.requests(model, prompt, most, shown, asked.grammar(model))

    prompt, requests = await in_thread(read)
    reply = _Reply(model, asked, prompt, [tool.function.name for tool in tools])
    if asked.stream:
        return await event_stream(answers(model.scheduler, requests), reply.chunks)
    return await whole_answer(request, answers(model.scheduler, requests), reply.whole)


class _Reply:
    """What is told of the answers to one request."""

    def __init__(self, model: ServedModel, asked: ChatRequest, prompt: Prompt, tools: Sequence[str]) -> None:
        self._model, self._asked = model, asked
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._readers = [model.reader(prompt, tools) for _ in range(asked.n)]
        self._calls = [0] * asked.n

    async def whole(self, opened: Any) -> dict[str, Any]:
        """One object, once all is written."""
        texts: list[dict[str, str]] = [{"content": "", "reasoning_content": ""} for _ in opened]
        calls: list[list[dict[str, Any]]] = [[] for _ in opened]
        probabilities: list[list[Any]] = [[] for _ in opened]
        usages, reasons = [Usage(0, 0, 0)] * len(opened), ["stop"] * len(opened)
        async for place, event in merged(opened):
            for part in _parts(self._readers[place], event):
                texts[place]["content"] += part.text
                texts[place]["reasoning_content"] += part.thought
                if part.call is not None:
                    calls[place].append(_call(part))
            if isinstance(event, Piece):
                probabilities[place] += [self._probability(one) for one in event.tokens]
            else:
                usages[place], reasons[place] = event.usage, _reason(event, bool(calls[place]))
        choices = []
        for place, (text, called) in enumerate(zip(texts, calls, strict=True)):
            message: dict[str, Any] = {"role": "assistant", "content": text["content"] or (None if called else "")}
            if text["reasoning_content"]:
                message["reasoning_content"] = text["reasoning_content"]
            if called:
                message["tool_calls"] = called
            shown = {"content": probabilities[place]} if self._asked.logprobs else None
            choices.append({"index": place, "message": message, "logprobs": shown, "finish_reason": reasons[place]})
        return {**self._head("chat.completion"), "choices": choices, "usage": usage_of(usages)}

    async def chunks(self, opened: Any) -> AsyncIterator[Streamed]:
        """Pieces, as they are written."""
        for place in range(len(opened)):
            yield self._chunk(place, {"role": "assistant", "content": ""})
        usages = [Usage(0, 0, 0)] * len(opened)
        try:
            async for place, event in merged(opened):
                unsaid = [self._probability(one) for one in event.tokens] if isinstance(event, Piece) else []
                for part in _parts(self._readers[place], event):
                    yield self._chunk(place, self._delta(place, part), unsaid)
                    unsaid = []
                if unsaid:
                    yield self._chunk(place, {"content": ""}, unsaid)
                if isinstance(event, Finished):
                    usages[place] = event.usage
                    yield self._chunk(place, {}, reason=_reason(event, self._calls[place] > 0))
        except RequestError as error:
            yield Streamed(json.dumps(body(PATH, error)))
            return
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            head = self._head("chat.completion.chunk")
            yield Streamed(json.dumps({**head, "choices": [], "usage": usage_of(usages)}))
        yield Streamed("[DONE]")

    def _delta(self, place: int, part: Part) -> dict[str, Any]:
        if part.call is None:
            return {"reasoning_content": part.thought} if part.thought else {"content": part.text}
        found = {"index": self._calls[place], **_call(part)}
        self._calls[place] += 1
        return {"tool_calls": [found]}

    def _chunk(
        self, place: int, delta: Mapping[str, Any], probabilities: Sequence[Any] = (), reason: str | None = None
    ) -> Streamed:
        shown = {"content": list(probabilities)} if probabilities else None
        choice = {"index": place, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return Streamed(json.dumps({**self._head("chat.completion.chunk"), "choices": [choice]}, ensure_ascii=False))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _probability(self, one: TokenProbability) -> dict[str, Any]:
        likeliest = [named_token(self._model, *other) for other in one.likeliest]
        return {**named_token(self._model, one.token, one.logprob), "top_logprobs": likeliest}


def named_token(model: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    """A token with its probability, as the protocol writes it; minus infinity is no JSON."""
    text = str(model.tokenizer.decode([token]))
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """Tokens of all answers; their prompt counts once."""
    written, prompt = sum(one.written for one in usages), usages[0].prompt
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached},
    }


def _parts(reader: PartReader, event: Piece | Finished) -> list[Part]:
    return reader.push(event.text) if isinstance(event, Piece) else reader.finish()


def _call(part: Part) -> dict[str, Any]:
    assert part.call is not None
    function = {"name": part.call.name, "arguments": part.call.arguments}
    return {"id": part.call.id, "type": "function", "function": function}


def _reason(event: Finished, called: bool) -> str:
    if event.reason is FinishReason.LENGTH:
        return "length"
    return "tool_calls" if called else "stop"
