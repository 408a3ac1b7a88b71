"""Memory that a contender needs: the peak resident set of its process group."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import psutil

from quern.core.errors import QuernError

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def peak_rss_bytes(leader: int | None = None) -> int:
    """Bytes that the processes of ``leader``'s group (default: this process's) held resident at most, each at its peak.

    The kernel's own high-water marks (``VmHWM``), so that nothing is missed between samples. Several processes may peak
    at different times; their sum is then an upper bound. On systems without /proc: this process's peak alone. Raises
    ``QuernError`` if the process is gone.
    """
    process = leader or os.getpid()
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        group = os.getpgid(process)
    except ProcessLookupError:
        raise QuernError(f"process {process} has ended; its memory cannot be read any more") from None
    members = [pid for pid in psutil.pids() if _group_of(pid) == group]
    return sum(_high_water_mark(pid) for pid in members)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _high_water_mark(pid: int) -> int:
    try:
        found = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
