"""Long texts in pieces that a tokenizer reads alike: cut where a line or a word begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE = 256 * 1024
"""Most characters that are tokenized at once. A tokenizer takes some 200 bytes of memory for each."""

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
    line = _last(text, "\n", first, end)
    if line is not None:
        return line + 1
    word = _last(text, " ", first, end + 1)
    return end if word is None else word


def _last(text: str, white: str, first: int, stop: int) -> int | None:
    """The last place of ``white`` between two other characters than white space: tokenizers split longer white space by
    what follows it."""
    at = text.rfind(white, first, stop)
    while at >= 0:
        if at + 1 < len(text) and not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
        at = text.rfind(white, first, at)
    return None
