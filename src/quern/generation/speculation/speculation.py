"""Guesses for texts that are written: how many, and what becomes of them.

A guess is right where it is the token that is chosen from the model's own logits, with the text's own random numbers. So
an answer is the one without guesses, token by token; only the passes over the weights are fewer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from quern.generation.speculation.drafter import Asked, Drafter
from quern.generation.speculation.pace import Pace

MOST_TOKENS = 8
"""Guesses for one text in one pass, where nobody says."""
FULL_PASS = 16
"""Tokens that a pass over the weights may have with guesses: in larger ones nearly all of them would have to be right to pay
(``pace.pays``)."""


@dataclass
class DraftCounts:
    """What became of guesses."""

    drafted: int = 0
    accepted: int = 0


class Speculation:
    """Asks a drafter no more than pays."""

    def __init__(self, drafter: Drafter, most: int = MOST_TOKENS, switch_length: int | None = None) -> None:
        """``switch_length``: see ``core.engine.SwitchingModel``; guesses make no text a long one."""
        self.counts = DraftCounts()
        self._drafter, self._most, self._switch_length = drafter, most, switch_length
        self._paces: dict[Hashable, Pace] = {}
        self._writing = 1
        """Texts of the last pass."""

    def propose(self, asked: Sequence[Asked], busy: int) -> list[list[int]]:
        """Guesses for each, for a pass that has ``busy`` tokens without them."""
        self._writing = max(len(asked), 1)
        share = (FULL_PASS - busy) // self._writing
        wanted = [replace(one, count=count) for one in asked if (count := min(share, self._size(one))) > 0]
        found = {one.key: draft for one, draft in zip(wanted, self._drafter.propose(wanted), strict=True)}
        return [found.get(one.key, []) for one in asked]

    def tell(self, key: Hashable, drafted: int, accepted: int) -> None:
        """A text took a step with so many guesses, of which so many were right."""
        self.counts.drafted += drafted
        self.counts.accepted += accepted
        if key in self._paces:
            self._paces[key].tell(drafted, accepted, self._writing)

    def forget(self, key: Hashable) -> None:
        """A text is done."""
        self._paces.pop(key, None)
        self._drafter.forget(key)

    def _size(self, one: Asked) -> int:
        size = min(one.count, self._paces.setdefault(one.key, Pace(self._most)).size)
        if self._switch_length is not None and len(one.ids) <= self._switch_length:
            size = min(size, self._switch_length - len(one.ids))
        return size
