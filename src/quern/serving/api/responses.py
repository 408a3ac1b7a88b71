"""OpenAI's responses: the newer form of its chat completions. Nothing is stored: a request brings its whole conversation."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from quern.serving.api.answers import answers, merged
from quern.serving.api.errors import RequestError
from quern.serving.api.fields import Body, JsonSchema, Name, ResponseFormat, SamplingFields, Several, Text
from quern.serving.api.served import in_thread, model_for
from quern.serving.api.streaming import Streamed, event_stream, whole_answer
from quern.serving.model import Prompt, ServedModel
from quern.serving.parts import Part, PartReader
from quern.serving.request import Finished, FinishReason, GenerationRequest, Piece, Usage

PATH = "/v1/responses"
router = APIRouter()


class Item(Body):
    """A message, a call of a tool, or what it gave."""

    type: Name = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: Text | Several[dict[str, Any]] | None = None
    call_id: str = ""
    name: Name = ""
    arguments: Text = "{}"
    output: Text | Several[dict[str, Any]] = ""

    def plain(self) -> dict[str, Any] | None:
        """As chat templates know it; None for what they do not see."""
        if self.type == "reasoning":
            return None
        if self.type == "function_call":
            call = {
                "id": self.call_id,
                "type": "function",
                "function": {"name": self.name, "arguments": self.arguments},
            }
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": _text_of(self.output)}
        if self.type != "message":
            raise RequestError(
                400, f"input has an item of type {self.type!r}, which this server does not know", "input"
            )
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text_of(self.content or "")}


class Tool(Body):
    """A tool."""

    type: Name = "function"
    name: Annotated[str, Field(max_length=256)] = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None


class TextFormat(JsonSchema):
    """What ``text.format`` says."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(Body):
    """``text``."""

    format: TextFormat | None = None


class ResponsesRequest(Body):
    """``POST /v1/responses``."""

    model: Name = ""
    input: Text | Annotated[Several[Item], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool = False
    tools: Annotated[Several[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates know it. Raises ``RequestError``."""
        if self.previous_response_id is not None:
            raise RequestError(400, "nothing is stored here: send the whole conversation", "previous_response_id")
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        return [*first, *(plain for item in self.input if (plain := item.plain()) is not None)]

    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        for tool in self.tools:
            if tool.type != "function" or not tool.name:
                raise RequestError(400, f"tools of type {tool.type!r} are not run here; give functions", "tools")
        if self.tool_choice == "none":
            return []
        if not isinstance(self.tool_choice, Tool):
            return self.tools
        found = [tool for tool in self.tools if tool.name == self.tool_choice.name]
        if not found:
            raise RequestError(400, f"tool_choice names {self.tool_choice.name!r}, which is not there", "tool_choice")
        return found

    def read(self, model: ServedModel, tools: list[Tool]) -> tuple[Prompt, list[GenerationRequest]]:
        """The conversation as the model reads it, and what is asked of it."""
        named = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})} for tool in tools
        ]
        prompt = model.conversation(self.messages(), named)
        form, grammar = None if self.text is None else self.text.format, None
        if tools and (self.tool_choice == "required" or isinstance(self.tool_choice, Tool)):
            grammar = model.calls({tool.name: tool.parameters or {} for tool in tools})
        elif form is not None:
            schema = form if form.type == "json_schema" else None
            grammar = ResponseFormat(type=form.type, json_schema=schema).grammar(model)
        sampling = SamplingFields(temperature=self.temperature, top_p=self.top_p)
        return prompt, sampling.requests(model, prompt, self.max_output_tokens, None, grammar)


@router.post(PATH, response_model=None)
async def respond(request: Request, asked: ResponsesRequest) -> Any:
    """Answer a conversation."""
    model = await model_for(request, asked.model)
    tools = asked.offered()
    prompt, requests = await in_thread(lambda: asked.read(model, tools))
    reply = _Reply(model, model.reader(prompt, [tool.name for tool in tools]))
    if asked.stream:
        return await event_stream(answers(model.scheduler, requests), reply.events)
    return await whole_answer(request, answers(model.scheduler, requests), reply.whole)


class _Reply:
    def __init__(self, model: ServedModel, reader: PartReader) -> None:
        self._reader, self._number = reader, -1
        self.response: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model.name,
            "status": "in_progress",
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": None,
        }

    async def whole(self, opened: Any) -> dict[str, Any]:
        """One object, once all is written."""
        async for _ in self.events(opened, raising=True):
            pass
        return self.response

    async def events(self, opened: Any, raising: bool = False) -> AsyncIterator[Streamed]:
        """Pieces, as they are written, and what they become in ``response``."""
        yield self._event("response.created", response=self.response)
        item: dict[str, Any] | None = None
        try:
            async for _, event in merged(opened):
                for part in self._reader.push(event.text) if isinstance(event, Piece) else self._reader.finish():
                    if item is None or item["type"] != _kind(part) or part.call is not None:
                        for told in self._closed(item):
                            yield told
                        item = self._opened(part)
                        for told in self._began(item):
                            yield told
                    yield self._grown(item, part)
                if isinstance(event, Finished):
                    for told in self._closed(item):
                        yield told
                    yield self._ended(event)
        except RequestError as error:
            if raising:
                raise
            self.response |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
            yield self._event("response.failed", response=self.response)

    def _opened(self, part: Part) -> dict[str, Any]:
        kind, status = _kind(part), "in_progress"
        item: dict[str, Any] = {"id": f"{kind[:3]}_{secrets.token_hex(12)}", "type": kind, "status": status}
        if part.call is not None:
            item |= {"call_id": part.call.id, "name": part.call.name, "arguments": ""}
        elif part.thought:
            item |= {"summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        else:
            item |= {"role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": []}]}
        self.response["output"].append(item)
        return item

    def _began(self, item: dict[str, Any]) -> list[Streamed]:
        shown = {**item, "content": []} if "content" in item else item
        told = [self._event("response.output_item.added", output_index=self._place, item=shown)]
        if "content" in item:
            told.append(self._event("response.content_part.added", **self._where(item), part=item["content"][0]))
        return told

    def _grown(self, item: dict[str, Any], part: Part) -> Streamed:
        if part.call is not None:
            item["arguments"] += part.call.arguments
            where = {"item_id": item["id"], "output_index": self._place}
            return self._event("response.function_call_arguments.delta", **where, delta=part.call.arguments)
        said = part.thought or part.text
        item["content"][0]["text"] += said
        kind = "reasoning_text" if part.thought else "output_text"
        return self._event(f"response.{kind}.delta", **self._where(item), delta=said)

    def _closed(self, item: dict[str, Any] | None) -> list[Streamed]:
        if item is None:
            return []
        item["status"] = "completed"
        told = []
        if item["type"] == "function_call":
            where = {"item_id": item["id"], "output_index": self._place}
            done = {**where, "arguments": item["arguments"], "name": item["name"]}
            told.append(self._event("response.function_call_arguments.done", **done))
        else:
            part = item["content"][0]
            told.append(self._event(f"response.{part['type']}.done", **self._where(item), text=part["text"]))
            told.append(self._event("response.content_part.done", **self._where(item), part=part))
        return [*told, self._event("response.output_item.done", output_index=self._place, item=item)]

    def _ended(self, end: Finished) -> Streamed:
        self.response |= {"status": "completed", "usage": _usage(end.usage)}
        if end.reason is FinishReason.LENGTH:
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return self._event(f"response.{self.response['status']}", response=self.response)

    @property
    def _place(self) -> int:
        return len(self.response["output"]) - 1

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        found = {"item_id": item["id"], "output_index": self._place, "content_index": 0}
        return found if item["type"] == "reasoning" else {**found, "logprobs": []}

    def _event(self, kind: str, **fields: Any) -> Streamed:
        self._number += 1
        said = {"type": kind, "sequence_number": self._number, **fields}
        return Streamed(json.dumps(said, ensure_ascii=False), kind)


def _kind(part: Part) -> str:
    return "function_call" if part.call is not None else "reasoning" if part.thought else "message"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.written,
    }


def _text_of(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.get("type") not in ("input_text", "output_text", "text"):
            raise RequestError(400, f"input has a part of type {part.get('type')!r}; this server takes text", "input")
    return "".join(str(part.get("text", "")) for part in content)
