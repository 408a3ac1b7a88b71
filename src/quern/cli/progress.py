"""Progress bars on stderr, with the time left; only log lines where stderr is not a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SPEED_WINDOW_S = 24 * 3600
"""A step of a large model takes minutes, so the time left is estimated from all steps, not from the last seconds."""


class RichTask:
    """One bar (the ``Task`` of core/progress.py)."""

    def __init__(self, bars: Progress, identifier: TaskID) -> None:
        self._bars = bars
        self._identifier = identifier

    def advance(self, steps: float = 1) -> None:
        """Move the bar on."""
        self._bars.advance(self._identifier, steps)

    def done(self) -> None:
        """Take the bar away."""
        self._bars.update(self._identifier, visible=False)
        self._bars.stop_task(self._identifier)


class RichProgress:
    """The ``Progress`` of core/progress.py, drawn while its ``with`` block runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=SPEED_WINDOW_S,
        )

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def task(self, description: str, total: float) -> RichTask:
        """A new bar."""
        return RichTask(self._bars, self._bars.add_task(description, total=total))

    def log(self, message: str) -> None:
        """A line above the bars."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
