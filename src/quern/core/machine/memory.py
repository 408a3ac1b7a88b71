"""Memory as the system counts it: what the machine has, what is free of it, what a process has held at most.

The one place that asks. Control groups are counted, so that in a container these are the container's figures.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/proc/self/cgroup")
"""Names the control groups of this process."""
MOUNT = Path("/sys/fs/cgroup")
"""Where Linux shows control groups, of version 1 or 2."""
_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
_RECLAIMED = {1: ("total_inactive_file", "total_active_file"), 2: ("inactive_file", "active_file")}
"""Fields of ``memory.stat``: cached files, which the kernel drops when memory is asked for."""
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def free_memory(groups: Path = GROUPS, mount: Path = MOUNT) -> int:
    """Bytes that can be taken without swapping, cached files counted as free.

    The least of what the machine has and what each control group leaves that this process is in, its own and those
    around it (Linux' Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
    """
    return max(0, min([int(psutil.virtual_memory().available), *_left(groups, mount)]))


def total_memory(groups: Path = GROUPS, mount: Path = MOUNT) -> int:
    """Bytes of the machine, or of the narrowest control group with this process in it where that is less."""
    limits = (_number(folder / _FILES[version][0]) for version, folder in _folders(groups, mount))
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def forget_peak() -> None:
    """Start ``peak_rss`` of this process anew at what is resident now, where the kernel can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss(process: int | None = None) -> int:
    """Greatest resident memory in bytes of a process (default: this one), since its start or ``forget_peak``.

    The kernel's own high-water mark, so that nothing is missed between two looks. 0 for another process that is gone, or
    on a system without /proc.
    """
    try:
        found = _PEAK.search(Path(f"/proc/{process or 'self'}/status").read_text("ascii", "replace"))
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    return _own_peak() if process is None else 0


def _own_peak() -> int:
    """From what every Unix tells, which on Linux may be the peak of the process that started this one."""
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _left(groups: Path, mount: Path) -> Iterator[int]:
    for version, folder in _folders(groups, mount):
        limit, used = (_number(folder / name) for name in _FILES[version])
        if limit is not None and used is not None:
            yield limit - used + _reclaimed(folder / "memory.stat", _RECLAIMED[version])


def _folders(groups: Path, mount: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of each group with this process in it; in a container the outer ones may not be shown."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, mount / "memory") if controllers else (2, mount)
        own = root / path.strip("/")
        yield version, own
        while own != root:
            own = own.parent
            yield version, own


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimed(path: Path, fields: tuple[str, ...]) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.partition(" ")[::2] for line in lines)
    return sum(int(values[name]) for name in fields if values.get(name, "").isdigit())
