"""How many processors other programs keep busy while something is timed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

import psutil


class ForeignLoad:
    """Processors kept busy since it was made, by others than this process and the groups of ``leaders``.

    Time that a hypervisor took away counts as others' work. None of this is exact for less than about half a second: the
    kernel counts in hundredths.
    """

    def __init__(self, leaders: Sequence[int] = ()) -> None:
        self._leaders = tuple(leaders)
        self._start = time.perf_counter()
        self._busy = _busy_seconds()
        self._own = self._own_seconds()

    def processors(self) -> float:
        """The mean number since the start."""
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
    return float(total)
