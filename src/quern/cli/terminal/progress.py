"""How far a job is, on stderr: bars on a terminal, elsewhere (a log file) a line now and then; both with the time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Task as RichTaskState
from rich.text import Text

from quern.core.machine.time_left import Pace, Work
from quern.core.progress import Task

LINE_INTERVAL_S = 10.0
"""Least time between two lines where there is no terminal."""
FIRST_LINE_S = 2.0
"""What takes no longer needs no line."""
_COUNTABLE = 1_000_000
"""Larger numbers of steps (bytes) are shown as a share."""


def progress_on(console: Console) -> RichProgress | LineProgress:
    """Bars or lines, whatever suits ``console``."""
    return RichProgress(console) if console.is_terminal else LineProgress(console)


class RichTask:
    """One bar (the ``Task`` of core/progress.py)."""

    def __init__(self, bars: Progress, identifier: TaskID, pace: Pace) -> None:
        self._bars = bars
        self._identifier = identifier
        self._pace = pace

    def advance(self, steps: float = 1) -> None:
        """Move the bar on."""
        self._pace.advance(steps, time.monotonic())
        self._bars.advance(self._identifier, steps)

    def done(self) -> None:
        """Take the bar away."""
        self._bars.update(self._identifier, visible=False)
        self._bars.stop_task(self._identifier)


class TimeLeft(ProgressColumn):
    """What the steps of a task so far say of the rest (``core/machine/time_left.py``)."""

    def render(self, task: RichTaskState) -> Text:
        left = task.fields["pace"].left(time.monotonic())
        return Text("-" if left is None else _duration(left))


class RichProgress:
    """The ``Progress`` of core/progress.py as bars, drawn while its ``with`` block runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> Task:
        """A new bar."""
        pace = Pace(total, done, time.monotonic(), work)
        return RichTask(self._bars, self._bars.add_task(description, total=total, completed=int(done), pace=pace), pace)

    def log(self, message: str) -> None:
        """A line above the bars."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


class LineTask:
    """A task shown as lines of text."""

    def __init__(self, lines: LineProgress, description: str, pace: Pace) -> None:
        self._lines = lines
        self._description = description
        self._pace = pace
        lines.tell(self._line)

    def advance(self, steps: float = 1) -> None:
        """Tell it, if it is time."""
        self._pace.advance(steps, time.monotonic())
        self._lines.tell(self._line)

    def done(self) -> None:
        """Nothing more to tell."""

    def _line(self) -> str:
        done, total, left = self._pace.done, self._pace.total, self._pace.left(time.monotonic())
        far = f"{done:,.0f} of {total:,.0f}" if total < _COUNTABLE else f"{100 * done / total:.0f} %"
        remaining = f", about {_duration(left)} left" if left is not None and done < total else ""
        return f"{self._description}: {far}{remaining}"


class LineProgress:
    """The ``Progress`` of core/progress.py as lines: one in ``LINE_INTERVAL_S`` at most, and what is logged."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._due = time.monotonic() + FIRST_LINE_S

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> Task:
        """A task to be told of."""
        return LineTask(self, description, Pace(total, done, time.monotonic(), work))

    def log(self, message: str) -> None:
        """A line, whenever it comes."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def tell(self, line: Callable[[], str]) -> None:
        """Print ``line()`` if the last one is long enough ago."""
        with self._lock:
            now = time.monotonic()
            if now < self._due:
                return
            self._due = now + LINE_INTERVAL_S
            self.log(line())


def _duration(seconds: float) -> str:
    """Two units at most, rounded: ``45 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
