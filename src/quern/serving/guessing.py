"""Guesses of what requests will write next, for the scheduler's steps; see ``generation.speculation``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from quern.generation.speculation.speculation import DraftCounts, Speculation
from quern.serving.running import Running

log = logging.getLogger("quern.serving")


class Guessing:
    """Speculation on the requests of a scheduler; without one nothing is guessed."""

    def __init__(self, speculation: Speculation | None, context: int) -> None:
        """``context``: tokens of a text with its answer, at most."""
        self.counts = DraftCounts() if speculation is None else speculation.counts
        self._speculation, self._context = speculation, context

    def drafts(self, batch: Sequence[tuple[Running, list[int]]]) -> list[list[int]]:
        """Guesses behind what each request of a step is fed; none behind pieces of a prompt that has more."""
        nothing: list[list[int]] = [[] for _ in batch]
        if self._speculation is None:
            return nothing
        writing = [place for place, (running, tokens) in enumerate(batch) if len(tokens) == len(running.pending)]
        asked = [batch[place][0].asked(self._context) for place in writing]
        try:
            proposed = self._speculation.propose(asked, sum(len(tokens) for _, tokens in batch))
            drafts = dict(zip(writing, proposed, strict=True))
            return [running.possible(drafts.get(place, [])) for place, (running, _) in enumerate(batch)]
        except Exception as error:  # of the draft model; answers do not depend on it
            log.error("guessing failed, and is given up", exc_info=error)
            self._speculation = None
            return nothing

    def tell(self, running: Running, drafted: int, accepted: int) -> None:
        """A request has taken a step with so many guesses, of which so many were right."""
        if self._speculation is not None:
            self._speculation.tell(running, drafted, accepted)

    def forget(self, running: Running) -> None:
        """A request is done, or begins again."""
        if self._speculation is not None:
            self._speculation.forget(running)
