"""Records of JSON: one value after another (JSON lines), or the elements of one list, from any size of file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quern.core.errors import BadFileError
from quern.texts.records import is_conversation
from quern.texts.stream import LINE_LIMIT

_WHITE = " \t\n\r"
_EDGE = 16
"""An error this close to the end of what was read may be only that the rest is missing."""


class _Buffer:
    """What was read and not yet used."""

    def __init__(self, path: Path, strings: Iterator[str]) -> None:
        self.path, self._strings = path, strings
        self.text, self.at, self._lines = "", 0, 0

    def more(self) -> bool:
        """Reads on, at least as much as is held, so that a long record is looked at few times; False at the end."""
        parts, held = [self.text[self.at :]], len(self.text) - self.at
        self._lines += self.text.count("\n", 0, self.at)
        fresh = 0
        while fresh < max(1, held) and (string := next(self._strings, "")):
            parts.append(string)
            fresh += len(string)
        self.text, self.at = "".join(parts), 0
        return fresh > 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _WHITE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def line(self, at: int | None = None) -> int:
        """The number of the line at a place in ``text``."""
        return 1 + self._lines + self.text.count("\n", 0, self.at if at is None else at)

    def error(self, problem: str, at: int | None = None) -> BadFileError:
        return BadFileError(
            self.path, f"line {self.line(at)} {problem}", "Give JSON lines, a JSON list, or plain text as .txt"
        )


def json_records(path: Path, strings: Iterator[str]) -> Iterator[Any]:
    """The values in ``strings``, or the elements of the list that it is. Raises ``BadFileError`` with a line number."""
    buffer = _Buffer(path, strings)
    if buffer.peek() == "[":
        buffer.at += 1
        yield from _elements(buffer)
        if buffer.peek():
            raise buffer.error("goes on behind the end of the list")
        return
    first = True
    while buffer.peek():
        value = _value(buffer)
        if first and isinstance(value, Mapping) and not buffer.peek():
            # {"data": [...]}: a list under one name.
            (only,) = value.values() if len(value) == 1 else (None,)
            yield from only if isinstance(only, list) and not is_conversation(only) else [value]
            return
        first = False
        yield value


def _elements(buffer: _Buffer) -> Iterator[Any]:
    if buffer.peek() == "]":
        buffer.at += 1
        return
    while True:
        if not buffer.peek():
            raise buffer.error("ends in the middle of a list")
        yield _value(buffer)
        mark = buffer.peek()
        if mark not in (",", "]"):
            raise buffer.error("is not JSON: a comma or the list's end is missing")
        buffer.at += 1
        if mark == "]":
            return


def _value(buffer: _Buffer) -> Any:
    """The value at the buffer's place, which is behind it afterwards."""
    while True:
        start = buffer.at
        try:
            value, end = json.JSONDecoder().raw_decode(buffer.text, start)
        except RecursionError:
            raise buffer.error("is nested too deeply") from None
        except json.JSONDecodeError as error:
            problem = f"is not JSON: {error.msg}"
            if not error.msg.startswith("Unterminated") and error.pos < len(buffer.text) - _EDGE:
                raise buffer.error(problem, error.pos) from None
            if len(buffer.text) - start > LINE_LIMIT:
                raise buffer.error(f"begins a record of more than {LINE_LIMIT} characters") from None
            if not buffer.more():
                raise buffer.error(problem, error.pos - start) from None
            continue
        except ValueError:  # the digits that Python makes a number of are limited
            raise buffer.error("holds a number with thousands of digits") from None
        if end == len(buffer.text) and buffer.more():
            continue  # a number may go on
        buffer.at = min(end, len(buffer.text))
        return value
