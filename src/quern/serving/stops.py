"""Texts that end an answer: found across pieces, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Holds back what may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None
        """The stop text that ended the answer."""

    def push(self, piece: str) -> str:
        """What can be shown once ``piece`` is there; after the first stop text nothing more."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(text.find(stop), stop) for stop in self._stops]
        hits = [(place + len(stop), place, stop) for place, stop in places if place >= 0]
        if hits:  # the one that is whole first, so that it does not matter where pieces end
            _, place, self.found = min(hits)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held if self.found is None else ""


def _overlap(text: str, stop: str) -> int:
    """Characters of the longest end of ``text`` that ``stop`` begins with, short of all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
