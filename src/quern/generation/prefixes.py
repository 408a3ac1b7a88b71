"""Texts that a model has read already: a request that begins like one of them takes its keys and values.

Texts are found by hashes of their blocks of tokens, each with all that lies before it, and compared token by token before
anything is shared, so that no two texts are ever taken for one another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quern.core.engine import BatchModel

BLOCK = 16
"""Tokens that are shared as one."""
MOST_KEPT = 256
"""Finished texts that are kept at most."""


@dataclass(eq=False)
class Text:
    """A text on the model: ``ids`` are the tokens whose keys and values ``sequence`` has."""

    sequence: Any
    ids: list[int]
    keys: list[int] = field(default_factory=list)
    """Hashes of its blocks, each with those before it."""


class Prefixes:
    """Running texts and finished ones; the finished ones go, oldest use first, where room is wanted."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._by_key: dict[int, list[Text]] = {}
        self._kept: OrderedDict[int, Text] = OrderedDict()  # by id(), least recently used first

    def __len__(self) -> int:
        """Finished texts that are kept."""
        return len(self._kept)

    def longest(self, ids: Sequence[int]) -> tuple[Text, int] | None:
        """The text that begins most like ``ids``, and how many tokens of it do: whole blocks, fewer than all of ``ids``."""
        found: list[list[Text]] = []
        for key in _keys(ids[: len(ids) - 1]):
            if key not in self._by_key:
                break
            found.append(self._by_key[key])
        for count in range(len(found), 0, -1):
            for text in reversed(found[count - 1]):
                if text.ids[: count * BLOCK] == list(ids[: count * BLOCK]):
                    if id(text) in self._kept:
                        self._kept.move_to_end(id(text))
                    return text, count * BLOCK
        return None

    def opened(self, model: BatchModel, ids: Sequence[int]) -> Text:
        """A text on ``model`` that begins with what another one has read of ``ids``. Raises ``UserError`` without room."""
        found = self.longest(ids)
        if found is None:
            return Text(model.open(), [])
        text, count = found
        sequence = text.sequence.fork(count)
        return Text(sequence, list(ids[: sequence.length]))

    def note(self, text: Text) -> None:
        """Make what ``text`` has read by now known to others."""
        for key in _keys(text.ids, len(text.keys), text.keys[-1] if text.keys else 0):
            text.keys.append(key)
            self._by_key.setdefault(key, []).append(text)

    def keep(self, text: Text) -> None:
        """``text`` is finished, and stays for others."""
        self.note(text)
        self._kept[id(text)] = text
        while len(self._kept) > self._most:
            self.evict()

    def forget(self, text: Text) -> None:
        """``text`` is gone; its sequence is closed."""
        self._kept.pop(id(text), None)
        for key in text.keys:
            texts = self._by_key[key]
            texts.remove(text)
            if not texts:
                del self._by_key[key]
        text.keys.clear()
        text.sequence.close()

    def evict(self) -> bool:
        """Let the finished text go that was not used for longest; False where there is none."""
        if not self._kept:
            return False
        self.forget(next(iter(self._kept.values())))
        return True


def _keys(ids: Sequence[int], done: int = 0, before: int = 0) -> Iterator[int]:
    """Hashes of the whole blocks of ``ids`` behind the first ``done``, of which ``before`` is the last one's."""
    for start in range(done * BLOCK, len(ids) - BLOCK + 1, BLOCK):
        before = hash((before, *ids[start : start + BLOCK]))
        yield before
