"""Anthropic's messages."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from quern.serving.api.answers import answers, merged
from quern.serving.api.errors import RequestError, body
from quern.serving.api.fields import Body, Name, SamplingFields, Several, StopText, Text
from quern.serving.api.served import in_thread, model_for
from quern.serving.api.streaming import Streamed, event_stream, whole_answer
from quern.serving.model import Prompt, ServedModel
from quern.serving.parts import Part
from quern.serving.request import Finished, FinishReason, GenerationRequest, Piece, Usage

PATH = "/v1/messages"
router = APIRouter()


class Block(Body):
    """A part of a message: text, a call of a tool, what it gave, a thought."""

    type: Name
    text: Text | None = None
    thinking: Text | None = None
    id: str = ""
    name: Name = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: Text | Several[Any] | None = None


class Message(Body):
    """What somebody said."""

    role: Literal["user", "assistant", "system"]
    content: Text | Several[Block]

    def plain(self) -> list[dict[str, Any]]:
        """As chat templates know it: results of tools are messages of their own."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        found: list[dict[str, Any]] = []
        text, calls = "", []
        for block in self.content:
            if block.type == "text":
                text += block.text or ""
            elif block.type == "tool_use":
                function = {"name": block.name, "arguments": json.dumps(block.input)}
                calls.append({"id": block.id, "type": "function", "function": function})
            elif block.type == "tool_result":
                found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _text_of(block.content)})
            elif block.type not in ("thinking", "redacted_thinking"):
                raise RequestError(
                    400, f"a message has a part of type {block.type!r}; this server takes text", "messages"
                )
        if calls:
            found.append({"role": self.role, "content": text, "tool_calls": calls})
        elif text or not found:
            found.append({"role": self.role, "content": text})
        return found


class Tool(Body):
    """A tool."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any] = {}


class ToolChoice(Body):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None


class CountRequest(Body):
    """``POST /v1/messages/count_tokens``."""

    model: Name = ""
    messages: Annotated[Several[Message], Field(min_length=1)]
    system: Text | Several[Block] | None = None
    tools: Annotated[Several[Tool], Field(max_length=128)] = []

    def prompt(self, model: ServedModel, tools: list[Tool]) -> Prompt:
        """The conversation as the model reads it."""
        messages = [plain for message in self.messages for plain in message.plain()]
        if self.system:
            said = self.system if isinstance(self.system, str) else "".join(block.text or "" for block in self.system)
            messages.insert(0, {"role": "system", "content": said})
        offered = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in tools
        ]
        return model.conversation(messages, offered)


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[Several[StopText], Field(max_length=16)] = []
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    tool_choice: ToolChoice | None = None

    def offered(self) -> list[Tool]:
        """The tools that may be called. Raises ``RequestError`` for one that is not among them."""
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "any"):
            return self.tools
        if choice.type == "none":
            return []
        found = [tool for tool in self.tools if tool.name == choice.name]
        if not found:
            raise RequestError(400, f"tool_choice names {choice.name!r}, which is not among the tools", "tool_choice")
        return found

    def read(self, model: ServedModel, tools: list[Tool]) -> tuple[Prompt, list[GenerationRequest]]:
        """The conversation as the model reads it, and what is asked of it."""
        prompt, grammar = self.prompt(model, tools), None
        if self.tool_choice is not None and self.tool_choice.type in ("any", "tool") and tools:
            grammar = model.calls({tool.name: tool.input_schema for tool in tools})
        sampling = SamplingFields(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, stop=self.stop_sequences or None
        )
        return prompt, sampling.requests(model, prompt, self.max_tokens, None, grammar)


@router.post(PATH, response_model=None)
async def messages(request: Request, asked: MessagesRequest) -> Any:
    """Answer a conversation."""
    model = await model_for(request, asked.model)
    tools = asked.offered()
    prompt, requests = await in_thread(lambda: asked.read(model, tools))
    reply = _Reply(model, prompt, [tool.name for tool in tools])
    if asked.stream:
        return await event_stream(answers(model.scheduler, requests), reply.events)
    return await whole_answer(request, answers(model.scheduler, requests), reply.whole)


@router.post(f"{PATH}/count_tokens", response_model=None)
async def count(request: Request, asked: CountRequest) -> Any:
    """Tokens of a conversation."""
    model = await model_for(request, asked.model)
    prompt = await in_thread(lambda: asked.prompt(model, asked.tools))
    return {"input_tokens": len(prompt.ids)}


class _Reply:
    def __init__(self, model: ServedModel, prompt: Prompt, tools: list[str]) -> None:
        self._model, self._prompt = model, prompt
        self._id = f"msg_{secrets.token_hex(12)}"
        self._reader = model.reader(prompt, tools)

    def _parts(self, event: Piece | Finished) -> list[Part]:
        return self._reader.push(event.text) if isinstance(event, Piece) else self._reader.finish()

    async def whole(self, opened: Any) -> dict[str, Any]:
        """One object, once all is written."""
        content: list[dict[str, Any]] = []
        end: Finished | None = None
        async for _, event in merged(opened):
            for part in self._parts(event):
                kind, said = _block_of(part)
                if content and content[-1]["type"] == kind and kind != "tool_use":
                    content[-1][kind] += said[kind]
                else:
                    content.append({"type": kind, **said})
            end = event if isinstance(event, Finished) else None
        assert end is not None
        called = any(block["type"] == "tool_use" for block in content)
        return {**self._head(content), **_ending(end, called), "usage": _usage(end.usage)}

    async def events(self, opened: Any) -> AsyncIterator[Streamed]:
        """Pieces, as they are written."""
        usage = {"input_tokens": len(self._prompt.ids), "output_tokens": 0}
        start = {**self._head([]), "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=start)
        place, open_kind, called = -1, "", False
        try:
            async for _, event in merged(opened):
                for part in self._parts(event):
                    kind, said = _block_of(part)
                    if kind != open_kind or kind == "tool_use":
                        if open_kind:
                            yield _event("content_block_stop", index=place)
                        place, open_kind = place + 1, kind
                        first = {**said, "input": {}} if kind == "tool_use" else {kind: ""}
                        yield _event("content_block_start", index=place, content_block={"type": kind, **first})
                    called = called or kind == "tool_use"
                    yield _event("content_block_delta", index=place, delta=_delta(kind, part))
                if isinstance(event, Finished):
                    if open_kind:
                        yield _event("content_block_stop", index=place)
                    yield _event("message_delta", delta=_ending(event, called), usage=_usage(event.usage))
        except RequestError as error:
            yield Streamed(json.dumps(body(PATH, error)), "error")
            return
        yield _event("message_stop")

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model.name}
        return {**head, "content": content}


def _block_of(part: Part) -> tuple[str, dict[str, Any]]:
    """The type of block that a part belongs to, and what it says there."""
    if part.call is not None:
        return "tool_use", {"id": part.call.id, "name": part.call.name, "input": json.loads(part.call.arguments)}
    return ("thinking", {"thinking": part.thought}) if part.thought else ("text", {"text": part.text})


def _delta(kind: str, part: Part) -> dict[str, Any]:
    if part.call is not None:
        return {"type": "input_json_delta", "partial_json": part.call.arguments}
    return {"type": f"{kind}_delta", kind: part.thought or part.text}


def _ending(end: Finished, called: bool) -> dict[str, Any]:
    reasons = {FinishReason.LENGTH: "max_tokens", FinishReason.STOP: "stop_sequence"}
    reason = reasons.get(end.reason, "tool_use" if called else "end_turn")
    return {"stop_reason": reason, "stop_sequence": end.stop}


def _usage(usage: Usage) -> dict[str, Any]:
    new = usage.prompt - usage.cached
    return {"input_tokens": new, "cache_read_input_tokens": usage.cached, "output_tokens": usage.written}


def _event(kind: str, **fields: Any) -> Streamed:
    return Streamed(json.dumps({"type": kind, **fields}, ensure_ascii=False), kind)


def _text_of(content: str | list[Any] | None) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""
