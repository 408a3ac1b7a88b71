"""How far a job is, in a file of its work folder, for whoever asks from outside (``quern status``)."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quern.core.machine.time_left import Pace, Work
from quern.core.progress import Progress, Task

INTERVAL_S = 1.0
"""Least time between two writings; the disk is not synced for them."""
_ABSURD = 1e15
"""No count of steps or bytes, and no time in seconds, that makes sense is so large."""


def _is_sane(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < _ABSURD  # type: ignore[operator]


@dataclass(frozen=True)
class Moment:
    """When a file was written, so that another process can tell how long ago: by the clock on the wall, which may be set
    meanwhile, and by one that only a reboot sets back."""

    updated: float
    """Seconds since the epoch."""
    boot: str | None = None
    """What the kernel calls the time since it started; None where it does not say."""
    since_boot: float | None = None

    @classmethod
    def now(cls) -> Moment:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
            return cls(time.time(), boot, time.clock_gettime(time.CLOCK_BOOTTIME))
        except (OSError, AttributeError):  # no Linux
            return cls(time.time())

    def ago(self, now: Moment) -> float | None:
        """Seconds from it to ``now``; None where both clocks make no sense of it."""
        seconds = now.updated - self.updated
        if self.boot is not None and self.boot == now.boot and None not in (self.since_boot, now.since_boot):
            assert now.since_boot is not None
            assert self.since_boot is not None
            seconds = now.since_boot - self.since_boot
        return seconds if _is_sane(seconds) else None


@dataclass
class TaskState:
    """One bar, as it would be drawn."""

    description: str
    total: float
    done: float
    """Steps that are done."""
    before: float
    """Those of them that an earlier run did."""
    seconds: float = 0.0
    """Since the task began in this run."""
    left: float | None = None
    """Seconds, as of when it was written; None before the first step of this run."""

    @classmethod
    def parse(cls, values: Any) -> TaskState:
        """What a file says of a task. Raises ``ValueError`` for numbers that are none, or absurd."""
        state = cls(**values)
        numbers = [state.total, state.done, state.before, state.seconds, *([] if state.left is None else [state.left])]
        if not isinstance(state.description, str) or not all(map(_is_sane, numbers)):
            raise ValueError(f"a task says {str(values)[:200]}")
        return state


class ProgressFile:
    """A ``Progress`` that hands everything on and keeps the open tasks in a file."""

    def __init__(self, path: Path, listener: Progress) -> None:
        self._path, self._listener = path, listener
        self._lock = threading.Lock()
        self._tasks: list[_FileTask] = []
        self._written = -INTERVAL_S

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> _FileTask:
        """The listener's task, noted."""
        task = _FileTask(
            self,
            TaskState(description, total, done, done),
            self._listener.task(description, total, done, work),
            Pace(total, done, time.monotonic(), work),
        )
        with self._lock:
            self._tasks.append(task)
        self.write(at_once=True)
        return task

    def log(self, message: str) -> None:
        """Handed on."""
        self._listener.log(message)

    def end(self, task: _FileTask) -> None:
        """The task is over."""
        with self._lock:
            self._tasks.remove(task)
        self.write(at_once=True)

    def write(self, at_once: bool = False) -> None:
        """Bring the file up to date if it is time. A disk that takes nothing does not end the job."""
        with self._lock:
            now = time.monotonic()
            if not at_once and now - self._written < INTERVAL_S:
                return
            self._written = now
            for task in self._tasks:
                task.state.seconds, task.state.left = now - task.started, task.pace.left(now)
            tasks = [asdict(task.state) for task in self._tasks]
            content = json.dumps({**asdict(Moment.now()), "tasks": tasks})
            unfinished = self._path.with_name(f".{self._path.name}")
            with suppress(OSError):
                unfinished.write_text(content, "utf-8")
                os.replace(unfinished, self._path)


class _FileTask:
    def __init__(self, file: ProgressFile, state: TaskState, listener: Task, pace: Pace) -> None:
        self._file, self.state, self._listener, self.pace = file, state, listener, pace
        self.started = time.monotonic()

    def advance(self, steps: float = 1) -> None:
        self.state.done += steps
        self.pace.advance(steps, time.monotonic())
        self._listener.advance(steps)
        self._file.write()

    def done(self) -> None:
        self._listener.done()
        self._file.end(self)
