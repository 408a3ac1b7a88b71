"""What an answer is made of: thoughts, text for the person, calls of tools. Told apart while it is written.

Tools are called in the notations that chat templates teach their models: JSON between ``<tool_call>`` marks (Hermes, Qwen),
or an answer that is one JSON object with a name and parameters (Llama 3).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"
OPEN_THOUGHT, CLOSE_THOUGHT = "<think>", "</think>"
PYTHON_TAG = "<|python_tag|>"
Notation = Literal["marked", "object"]


@dataclass(frozen=True)
class ToolCall:
    """A tool that is to be called."""

    name: str
    arguments: str
    """JSON."""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Part:
    """Some of an answer; one of the three is there."""

    text: str = ""
    thought: str = ""
    call: ToolCall | None = None


def notation_of(template: str) -> Notation:
    """How a model with this chat template calls tools."""
    return (
        "object" if OPEN_CALL not in template and ("python_tag" in template or '"parameters"' in template) else "marked"
    )


def opens_thinking(prompt: str) -> bool:
    """Whether an answer to ``prompt`` begins inside of a thought, because the template has opened it."""
    return prompt.rstrip().endswith(OPEN_THOUGHT)


class PartReader:
    """Reads an answer piece by piece. What may be a mark, or a call that is not whole yet, is held back."""

    def __init__(
        self, *, tools: Sequence[str] = (), notation: Notation = "marked", thinks: bool = False, open: bool = False
    ):
        """``tools``: names that may be called; ``thinks``: thoughts are told apart; ``open``: the answer begins in one."""
        self._tools, self._notation, self._thinks = frozenset(tools), notation, thinks
        self._held = ""
        self._thinking = thinks and open
        self._begun = False
        self._trim = False
        """Whether line ends at the front mean nothing, because they follow a mark."""

    def push(self, piece: str) -> list[Part]:
        """What ``piece`` makes certain."""
        self._held += piece
        found: list[Part] = []
        while (part := self._next()) is not None:
            if part.text or part.thought or part.call:
                found.append(part)
        return found

    def finish(self) -> list[Part]:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        if not held:
            return []
        if self._thinking:
            return [Part(thought=held)]
        calls = self._calls(held)
        return [Part(call=call) for call in calls] if calls else [Part(text=held)]

    def _next(self) -> Part | None:
        """The next part, an empty one where only marks were read, or None where more has to come."""
        if self._trim:
            self._held = self._held.lstrip("\n")
            self._trim = not self._held
        if self._thinking:
            return self._until(CLOSE_THOUGHT, "thought")
        if not self._begun:
            self._held = self._held.lstrip() if self._thinks else self._held
            if self._thinks and self._held.startswith(OPEN_THOUGHT):
                self._held = self._held[len(OPEN_THOUGHT) :]
                self._thinking = True
                return Part()
            if not self._held or (self._thinks and OPEN_THOUGHT.startswith(self._held)):
                return None
            if self._tools and self._notation == "object":
                start = self._held.lstrip().removeprefix(PYTHON_TAG).lstrip()
                if not start or start[0] in "{<":
                    return None  # one object from the first character to the last
            self._begun = True
        if not self._tools or self._notation != "marked":
            return self._all()
        if self._held.startswith(OPEN_CALL):
            end = self._held.find(CLOSE_CALL)
            if end < 0:
                return None
            inner, self._held = self._held[len(OPEN_CALL) : end], self._held[end + len(CLOSE_CALL) :]
            self._trim = True
            calls = self._calls(inner)
            return Part(call=calls[0]) if calls else Part(text=f"{OPEN_CALL}{inner}{CLOSE_CALL}")
        return self._until(OPEN_CALL, "text")

    def _until(self, mark: str, what: Literal["text", "thought"]) -> Part | None:
        """What lies before ``mark``; the mark itself is taken away where it ends a thought."""
        place = self._held.find(mark)
        if place >= 0:
            before, self._held = self._held[:place], self._held[place:]
            if what == "thought":
                self._held = self._held[len(mark) :]
                self._thinking, self._begun, self._trim = False, True, True
                return Part(thought=before.rstrip("\n"))
            return Part(text=before.rstrip("\n") if before.strip() else "")
        keep = next((size for size in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:size])), 0)
        before = self._held[: len(self._held) - keep]
        keep += len(before) - len(before.rstrip("\n"))
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if not shown:
            return None
        return Part(thought=shown) if what == "thought" else Part(text=shown)

    def _all(self) -> Part | None:
        shown, self._held = self._held, ""
        return Part(text=shown) if shown else None

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls that ``text`` is; none where it is anything else."""
        if not self._tools:
            return []
        text = text.strip().removeprefix(OPEN_CALL).removesuffix(CLOSE_CALL).strip().removeprefix(PYTHON_TAG)
        calls = []
        for one in text.split(";") if self._notation == "object" and text.count('"name"') > 1 else [text]:
            try:
                found: Any = json.loads(one)
            except (ValueError, RecursionError):
                return []
            if not isinstance(found, dict) or found.get("name") not in self._tools:
                return []
            arguments = found.get("arguments", found.get("parameters", {}))
            text_of = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(found["name"], text_of))
        return calls
