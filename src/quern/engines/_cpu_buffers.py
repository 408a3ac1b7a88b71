"""Buffers of the native decoder, which have a row of numbers for each token (csrc/engine/steps.h)."""

from __future__ import annotations


class Buffers:
    """Buffers by name and width; layers that ask for the same share it."""

    def __init__(self) -> None:
        self._indices: dict[tuple[str, int], int] = {}

    def of(self, name: str, width: int) -> int:
        """The index of the buffer called ``name`` with ``width`` numbers a token."""
        return self._indices.setdefault((name, width), len(self._indices))

    @property
    def widths(self) -> list[int]:
        """Of all buffers that were asked for, by index."""
        return [width for _, width in self._indices]
