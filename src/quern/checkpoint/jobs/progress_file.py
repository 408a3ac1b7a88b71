"""How far a job is, in a file of its work folder, for whoever asks from outside (``quern status``)."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from quern.core.progress import Progress, Task

INTERVAL_S = 1.0
"""Least time between two writings; the disk is not synced for them."""


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

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this run so far; None before its first step."""
        own = self.done - self.before
        return self.seconds / own * (self.total - self.done) if own > 0 else None


class ProgressFile:
    """A ``Progress`` that hands everything on and keeps the open tasks in a file."""

    def __init__(self, path: Path, listener: Progress) -> None:
        self._path, self._listener = path, listener
        self._lock = threading.Lock()
        self._tasks: list[_FileTask] = []
        self._written = -INTERVAL_S

    def task(self, description: str, total: float, done: float = 0) -> _FileTask:
        """The listener's task, noted."""
        task = _FileTask(self, TaskState(description, total, done, done), self._listener.task(description, total, done))
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
                task.state.seconds = now - task.started
            content = json.dumps({"updated": time.time(), "tasks": [asdict(task.state) for task in self._tasks]})
            unfinished = self._path.with_name(f".{self._path.name}")
            with suppress(OSError):
                unfinished.write_text(content, "utf-8")
                os.replace(unfinished, self._path)


class _FileTask:
    def __init__(self, file: ProgressFile, state: TaskState, listener: Task) -> None:
        self._file, self.state, self._listener = file, state, listener
        self.started = time.monotonic()

    def advance(self, steps: float = 1) -> None:
        self.state.done += steps
        self._listener.advance(steps)
        self._file.write()

    def done(self) -> None:
        self._listener.done()
        self._file.end(self)
