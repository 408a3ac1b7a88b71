"""Long texts in pieces that a tokenizer reads alike: cut where a line or a word begins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE = 256 * 1024
"""Most characters that are tokenized at once. A tokenizer takes some 200 bytes of memory for each."""

# Not at longer white space: tokenizers split that by what follows it.
_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_WORD = re.compile(r"(?<=\S) (?=\S)")
_SPAN = 4096
"""Characters at the end of a piece in which the place of the cut is searched."""


def cut_pieces(strings: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """The text that ``strings`` join to, in pieces of at most ``size`` characters; nothing for an empty text.

    A cut lies before the first letter of a line, else before the space in front of a word, and only in a text that has
    neither within 4096 characters anywhere.
    """
    held: list[str] = []
    length = 0
    for string in strings:
        held.append(string)
        length += len(string)
        if length <= size:
            continue
        text, start = "".join(held), 0
        while len(text) - start > size:
            stop = _cut(text, start, start + size)
            yield text[start:stop]
            start = stop
        held, length = [text[start:]], len(text) - start
    if length:
        yield "".join(held)


def _cut(text: str, start: int, end: int) -> int:
    """The last good place to cut ``text`` between ``start`` and ``end``; what stands at ``end`` is known."""
    first = max(start + 1, end - _SPAN)
    lines = [match.end() for match in _LINE.finditer(text, first - 1, end + 1) if match.end() <= end]
    if lines:
        return lines[-1]
    words = [match.start() for match in _WORD.finditer(text, first, end + 2) if match.start() <= end]
    return words[-1] if words else end
