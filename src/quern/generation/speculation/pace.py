"""How many tokens to guess next, from what became of the guesses before."""

from __future__ import annotations

FIRST = 4
"""Tokens of the first guess."""
MISSES = 2
"""Guesses in a row that did not pay, after which there is a rest."""
SHORTEST_REST = 8
LONGEST_REST = 256
"""Steps without guesses; each rest is twice as long as the one before, until a guess has been right."""


class Pace:
    """Of one text: twice as many after a guess that was right to its end, else one more than were right."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, min(FIRST, most)
        self._misses, self._left, self._rest = 0, 0, SHORTEST_REST

    @property
    def size(self) -> int:
        """Tokens to guess now; 0 while it rests."""
        return 0 if self._left else self._size

    def tell(self, drafted: int, accepted: int, writing: int = 1) -> None:
        """A step in which ``writing`` texts were written is over, with so many guesses, of which so many were right."""
        if drafted == 0:
            self._left = max(self._left - 1, 0)
            return
        self._size = min(self._most, 2 * self._size if accepted == drafted else accepted + 1)
        if pays(drafted, accepted, writing):
            self._misses, self._rest = 0, SHORTEST_REST
            return
        self._misses += 1
        if self._misses >= MISSES:
            self._left, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)


def pays(drafted: int, accepted: int, writing: int) -> bool:
    """Whether guesses brought more than they cost, beside ``writing`` texts.

    Where arithmetic counts, each token makes a pass longer by about a third of what one token takes
    (``benchmarks/speculation.py``), so n tokens take (n + 2) / 3. A guess costs 1 / 3 then, in which the others would have
    written n / (n + 2) tokens: so large a share must be right.
    """
    return accepted * (writing + 2) >= drafted * writing
