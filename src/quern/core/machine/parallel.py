"""Threads that do not change results.

Numeric libraries split a matrix product differently for different thread counts, which changes the order of additions
and so the last bits. Quern therefore cuts work into pieces whose size depends on the problem only, runs torch with one
thread inside each piece, and spreads the pieces over Python threads (torch releases the interpreter lock in its kernels).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from quern.core.errors import UserError, option
from quern.core.machine.heap import use_one_heap

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
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


class Workers:
    """A pool of ``threads`` workers for pieces of torch work; ``threads`` never changes a result."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = thread_count(threads)
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def map(self, function: Callable[[Item], Outcome], items: Iterable[Item]) -> list[Outcome]:
        """``function`` of every item, in the order of the items. The first exception is raised, after all have ended."""
        if self._pool is None:
            return [function(item) for item in items]
        return [future.result() for future in [self._pool.submit(function, item) for item in items]]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


@contextmanager
def deterministic_workers(threads: int | None = None) -> Iterator[Workers]:
    """Workers, with torch itself held to one thread until the block ends."""
    import torch

    use_one_heap()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    workers = Workers(threads)
    try:
        yield workers
    finally:
        workers.close()
        torch.set_num_threads(before)


def pieces(total: int, size: int) -> list[tuple[int, int]]:
    """``[0, total)`` cut into ``(start, stop)`` of at most ``size``."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]
