"""Memory that a contender needs: the peak resident set of its process group."""

from __future__ import annotations

import os
import sys

import psutil

from quern.core.errors import QuernError
from quern.core.machine.memory import peak_rss


def peak_rss_bytes(leader: int | None = None) -> int:
    """Bytes that the processes of ``leader``'s group (default: this process's) held resident at most, each at its peak.

    Several processes may peak at different times; their sum is then an upper bound. On systems without /proc: this
    process's peak alone. Raises ``QuernError`` if the process is gone.
    """
    if not sys.platform.startswith("linux"):
        return peak_rss()
    process = leader or os.getpid()
    try:
        group = os.getpgid(process)
    except ProcessLookupError:
        raise QuernError(f"process {process} has ended; its memory cannot be read any more") from None
    return sum(peak_rss(pid) for pid in psutil.pids() if _group_of(pid) == group)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
