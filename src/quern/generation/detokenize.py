"""Text from tokens that come one at a time: never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders put where bytes are no (or not yet a) character."""


class Detokenizer:
    """Turns a growing sequence of tokens into pieces of text that join to the whole.

    How a token reads depends on its neighbours (a leading space, the bytes of one character), so each piece is what the
    text grows by when the token is decoded after those before it, beginning with ``context`` (the prompt).

    ``decode`` is that of any tokenizer. ``tokenizers.decoders.DecodeStream`` (0.23) is not used: it needs a tokenizer of
    that library, says again the bytes of a prompt that ends inside a character, raises where byte fallback meets bytes that
    are no character, and keeps to itself what is unfinished at the end.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context)
        self._start = 0
        self._said = len(self._ids)

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._ids.append(token)
        piece = self._grown()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._start, self._said = self._said, len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left at the end: bytes that never became a character."""
        piece = self._grown() if self._said < len(self._ids) else ""
        self._said = len(self._ids)
        return piece

    def _grown(self) -> str:
        before = self._decode(self._ids[self._start : self._said])
        return self._decode(self._ids[self._start :])[len(before) :]
