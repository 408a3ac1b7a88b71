"""How long jobs tell what they are doing without knowing who listens: the command line draws bars, tests nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from quern.core.machine.time_left import Work


class Task(Protocol):
    """One bar."""

    def advance(self, steps: float = 1) -> None:
        """So many steps more are done."""
        ...

    def done(self) -> None:
        """The task is finished; its bar may go."""
        ...


class Progress(Protocol):
    """Where work reports how far it has got."""

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> Task:
        """A new bar of ``total`` steps, of which an earlier run has ``done`` some: the time left is that of the rest.
        ``work`` says of each step, those included, how much it is; None: all are alike."""
        ...

    def log(self, message: str) -> None:
        """A line for the person watching."""
        ...


class _SilentTask:
    def advance(self, steps: float = 1) -> None:
        pass

    def done(self) -> None:
        pass


class Silent:
    """Listens to nothing."""

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> Task:
        return _SilentTask()

    def log(self, message: str) -> None:
        pass


@contextmanager
def telling(progress: Progress, line: Callable[[], str], every_s: float) -> Iterator[None]:
    """Log ``line()`` every ``every_s`` seconds during the block: for work of others that says nothing itself."""
    over = threading.Event()

    def tell() -> None:
        while not over.wait(every_s):
            progress.log(line())

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
