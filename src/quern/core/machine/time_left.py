"""How long a task still takes, by what its steps have taken in this run.

Steps of one kind and size take as long as each other; a kind that no step was of yet is taken to have the rate of the
others. Time that has gone by in the step in hand counts as done of it, up to what the step should take. Only differences
of a clock that never jumps come in, and only steps of this run: another machine may have done those before.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

REMEMBERED = 16
"""Steps of a kind that count, the last ones: on a machine that is shared, a day is not like another."""


@dataclass(frozen=True)
class Work:
    """What one step of a task is: how much of which kind. Sizes of all kinds of a task are in one unit."""

    kind: Hashable
    size: float


class Pace:
    """The steps of one task in this run. Times are seconds of a clock that never jumps."""

    def __init__(self, total: float, done: float, now: float, work: Sequence[Work] | None = None) -> None:
        """``done``: steps that an earlier run did; ``work``: of each step, those included; None: all are alike."""
        self.total, self.done, self._before = total, done, done
        self._work, self._last, self._started = work, now, now
        self._seen: dict[Hashable, deque[tuple[float, float]]] = {}
        self._lock = threading.Lock()  # some tasks are advanced by several threads

    def advance(self, steps: float, now: float) -> None:
        """So many more are done; where they are not alike, a whole number of them."""
        with self._lock:
            first, self.done = self.done, self.done + steps
            own = [] if self._work is None else self._work[int(first) : int(self.done)]
            whole = sum(step.size for step in own) or 1.0
            for step in own:
                seconds = (now - self._last) * step.size / whole
                self._seen.setdefault(step.kind, deque(maxlen=REMEMBERED)).append((step.size, seconds))
            self._last = now

    def left(self, now: float) -> float | None:
        """Seconds until the last step is done; None before the first one of this run."""
        with self._lock:
            return self._left(now) if self.done > self._before else None

    def _left(self, now: float) -> float:
        if self._work is None:
            each = (self._last - self._started) / (self.done - self._before)
            expected = [(self.total - self.done) * each]
        else:
            expected = [step.size * self._rate(step.kind) for step in self._work[int(self.done) :]]
        in_hand = max(0.0, sum(expected[:1]) - (now - self._last))
        return in_hand + sum(expected[1:])

    def _rate(self, kind: Hashable) -> float:
        """Seconds for a unit of this kind, or of all that was seen."""
        known = self._seen.get(kind) or [one for seen in self._seen.values() for one in seen]
        return sum(seconds for _, seconds in known) / (sum(size for size, _ in known) or 1.0)
