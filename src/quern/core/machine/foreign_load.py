"""How many processors other programs keep busy while something is timed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

import psutil

SHORTEST_S = 0.5
"""What others did in less time than this cannot be told."""


class ForeignLoad:
    """Processors kept busy since it was made, by others than this process, those it started that have ended, and the groups
    of ``leaders``.

    Time that a hypervisor took away counts as others' work. The kernel counts in hundredths of a second, so ``SHORTEST_S``
    have to pass before there is anything to tell.
    """

    def __init__(self, leaders: Sequence[int] = ()) -> None:
        self._leaders = tuple(leaders)
        self._start = time.perf_counter()
        self._busy = _busy_seconds()
        self._own = self._own_seconds()

    def processors(self) -> float:
        """The mean number since the start; waits until that is long enough ago."""
        time.sleep(max(0.0, SHORTEST_S - self.seconds))
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        foreign = (_busy_seconds() - self._busy) - (self._own_seconds() - self._own)
        return max(0.0, foreign / elapsed)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._start

    def _own_seconds(self) -> float:
        return sum(_seconds_of(process) for process in (os.getpid(), *self._leaders))


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, kind, 0.0) for kind in kinds))


def _seconds_of(process_id: int) -> float:
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(process_id)
        children = process.children(recursive=True) if process_id != os.getpid() else []
        for member in [process, *children]:
            with contextlib.suppress(psutil.Error):
                times = member.cpu_times()
                total += times.user + times.system
                total += getattr(times, "children_user", 0.0) + getattr(
                    times, "children_system", 0.0
                )  # that have ended
    return float(total)
