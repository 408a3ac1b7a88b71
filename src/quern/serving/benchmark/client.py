"""One streamed completion, and when its pieces came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

LONGEST_ERROR = 200
"""Characters of an error that are kept."""


@dataclass
class Timing:
    """What became of one request; times in seconds since it was sent."""

    first: float | None = None
    """When the first piece came."""
    gaps: list[float] = field(default_factory=list)
    """Between pieces."""
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    answer_tokens: int = 0
    text: str = ""
    error: str | None = None


async def completion(client: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> Timing:
    """``POST`` a completion to ``url`` and read its stream. A failure is told in the result, none is raised."""
    found, begin = Timing(), time.perf_counter()
    asked = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", url, json=asked) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode("utf-8", "replace")
                found.error = f"status {response.status_code}: {said[:LONGEST_ERROR]}"
            else:
                await _read(response.aiter_lines(), found, begin)
    except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
        found.error = f"{type(error).__name__}: {str(error)[:LONGEST_ERROR]}".rstrip(": ")
    found.end = time.perf_counter() - begin
    return found


async def _read(lines: AsyncIterator[str], found: Timing, begin: float) -> None:
    last, pieces, ended = 0.0, 0, False
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            ended = True
            break
        chunk = json.loads(data)
        if "error" in chunk:
            found.error = f"in the stream: {json.dumps(chunk['error'])[:LONGEST_ERROR]}"
            return
        now = time.perf_counter() - begin
        for choice in chunk.get("choices") or ():
            ended = ended or choice.get("finish_reason") is not None
            if not choice.get("text"):
                continue
            found.text += choice["text"]
            pieces += 1
            if found.first is None:
                found.first = now
            else:
                found.gaps.append(now - last)
            last = now
        _count(chunk.get("usage"), found)
    found.answer_tokens = found.answer_tokens or pieces
    if not ended:
        found.error = "the stream broke off"


def _count(usage: Any, found: Timing) -> None:
    """What the server says of tokens, with the last piece or after it."""
    if not isinstance(usage, dict):
        return
    found.prompt_tokens, found.answer_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and details.get("cached_tokens") is not None:
        found.cached_tokens = int(details["cached_tokens"])
