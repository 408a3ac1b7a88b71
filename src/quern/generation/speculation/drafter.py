"""What makes guesses, as whoever reads them sees it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quern.generation.sampling import Sampler


@dataclass(frozen=True)
class Asked:
    """A text whose next tokens are to be guessed."""

    key: Hashable
    """The same for the same text from one step to the next, while it grows."""
    ids: Sequence[int]
    """All of its tokens."""
    count: int
    """Tokens to guess, at most."""
    sampler: Sampler
    """What will choose its tokens; not to be drawn from."""


class Drafter(Protocol):
    """Guesses tokens. A guess costs time where it is wrong, and changes no answer."""

    def propose(self, asked: Sequence[Asked]) -> list[list[int]]:
        """For each at most ``count`` tokens that may follow; none where there is nothing to go by."""
        ...

    def forget(self, key: Hashable) -> None:
        """The text is done; it may never have been asked about."""
        ...
