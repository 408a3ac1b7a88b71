"""Guesses from the text itself: what followed the last tokens where they stood before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). The longest repetition decides, of
equally long ones the latest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from quern.generation.speculation.drafter import Asked

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST = 2
"""Tokens that must repeat."""
LONGEST = 16
"""Tokens that are looked at; longer repetitions count as so long."""


class NgramDrafter:
    """See ``speculation.drafter.Drafter``."""

    def propose(self, asked: Sequence[Asked]) -> list[list[int]]:
        """For each what followed last time, up to ``count`` tokens."""
        return [follows(np.asarray(one.ids, np.int32), one.count) for one in asked]

    def forget(self, key: Hashable) -> None:
        """Nothing is kept of texts."""


def follows(ids: NDArray[np.integer[Any]], count: int) -> list[int]:
    """Up to ``count`` tokens that followed the longest earlier repetition of the last tokens of ``ids``; none without one.

    Where the repetition reaches the end of ``ids``, it goes on: a text that goes round in circles stays in them.
    """
    last = len(ids) - 1
    ends, length = (
        np.flatnonzero(ids[:last] == ids[last]),
        1,
    )  # places where a repetition of the last `length` tokens ends
    while length < LONGEST:
        longer = ends[ends >= length]
        longer = longer[ids[longer - length] == ids[last - length]]
        if len(longer) == 0:
            break
        ends, length = longer, length + 1
    if len(ends) == 0 or length < FEWEST:
        return []
    start = int(ends[-1]) + 1
    return [int(ids[start + place % (len(ids) - start)]) for place in range(count)]
