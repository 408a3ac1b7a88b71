"""Threads that do not change results.

Numeric libraries split a matrix product differently for different thread counts, which changes the order of additions
and so the last bits. Quern therefore cuts work into pieces whose size depends on the problem only, runs torch with one
thread inside each piece, and spreads the pieces over Python threads (torch releases the interpreter lock in its kernels).
Pieces that are handed all they read, and hand back all they make, can go to other machines instead (``Workers.spread``).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, TypeVar

from quern.core.errors import UserError, option
from quern.core.machine.heap import use_one_heap

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Shared = TypeVar("Shared")
MOST_THREADS = 1024


def available_threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(threads: int | None) -> int:
    """``threads``, or as many as there are processors for None. Raises ``UserError`` for what is no number of threads."""
    if threads is None:
        return available_threads()
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise UserError(
            f"{option('threads', '--threads')} is {threads!r}; it must be a whole number from 1 to {MOST_THREADS}"
        )
    return threads


class Lent(ABC):
    """What stands for a value that pieces elsewhere read."""

    @abstractmethod
    def fetch(self) -> Any:
        """The value, which nobody may change."""


def fetched(value: Shared) -> Shared:
    """``value``, or what it stands for where ``Workers.lend`` made it."""
    return value.fetch() if isinstance(value, Lent) else value


class Workers:
    """A pool of ``threads`` workers for pieces of torch work; ``threads`` never changes a result."""

    elsewhere: ClassVar[bool] = False
    """Whether ``spread`` takes pieces to other processes, so that it is worth cutting work into more of them."""
    waves_at_once: int = 1
    """Items that ``ahead`` has in work, and so in memory."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = thread_count(threads)
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def map(self, function: Callable[[Item], Outcome], items: Iterable[Item]) -> list[Outcome]:
        """``function`` of every item, in the order of the items. The first exception is raised, after all have ended."""
        if self._pool is None:
            return [function(item) for item in items]
        return [future.result() for future in [self._pool.submit(function, item) for item in items]]

    def spread(
        self, function: Callable[[Shared, Item], Outcome], shared: Shared, items: Iterable[Item]
    ) -> list[Outcome]:
        """``map`` of ``function(shared, item)``, which another process may carry out.

        So ``function`` is one of a module, changes none of its arguments and reads nothing else. ``shared`` may be what
        ``lend`` returned; parts of an item may be too, of which ``fetched`` makes the value.
        """
        return self.map(partial(function, shared), items)

    def lend(self, value: Shared) -> Shared:
        """``value``, or what stands for it as it is now, for the pieces of several ``spread``."""
        return value

    def ahead(self, function: Callable[..., Outcome], items: Iterable[tuple[Any, ...]]) -> Iterator[Outcome]:
        """``function(*item)`` of every item, in order; each when it is asked for, or before."""
        return (function(*item) for item in items)

    def reserve(self, each: int, cap: int | None) -> None:
        """Say that a process that carries out pieces will take ``each`` bytes, and may take ``cap``. Raises ``UserError``
        where that is too much."""

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


_MAKER: ContextVar[Callable[[int | None], Workers]] = ContextVar("maker of workers", default=Workers)


@contextmanager
def workers_made_by(maker: Callable[[int | None], Workers]) -> Iterator[None]:
    """Inside, ``deterministic_workers`` are those that ``maker`` makes for a number of threads."""
    token = _MAKER.set(maker)
    try:
        yield
    finally:
        _MAKER.reset(token)


@contextmanager
def deterministic_workers(threads: int | None = None) -> Iterator[Workers]:
    """Workers, with torch itself held to one thread until the block ends."""
    import torch

    use_one_heap()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    workers = _MAKER.get()(threads)
    try:
        yield workers
    finally:
        workers.close()
        torch.set_num_threads(before)


def pieces(total: int, size: int) -> list[tuple[int, int]]:
    """``[0, total)`` cut into ``(start, stop)`` of at most ``size``."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]
