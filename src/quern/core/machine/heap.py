"""Give freed memory back to the system, so that resident memory does not creep up with the number of blocks.

glibc keeps what is freed, and gives every thread a heap of its own: what two workers freed in one block is not there for
the next. Elsewhere (musl, macOS, Windows) these functions do nothing.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

M_ARENA_MAX = -8  # malloc.h


@cache
def _library() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if library is not None and hasattr(library, "malloc_trim") else None


def use_one_heap() -> None:
    """Let threads that start from now on share the process's heap."""
    if (library := _library()) is not None:
        library.mallopt(M_ARENA_MAX, 1)


def release_freed() -> None:
    """Return the pages of freed memory to the system; costs milliseconds, so between the large steps only."""
    if (library := _library()) is not None:
        library.malloc_trim(0)
