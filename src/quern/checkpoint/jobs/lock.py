"""One process at a time in a folder: a lock that goes with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from quern.core.errors import UserError


def acquire(path: Path, folder: Path) -> int:
    """A descriptor that holds the lock file ``path`` (made if missing) for work in ``folder``; closing it releases it.

    Raises ``UserError`` when another process holds it, ``OSError`` when the file cannot be made or locked.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise UserError(
                f"another process (id {owner or 'unknown'}) is working in {folder}. Wait for it, or choose another"
                " output"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        if _is_still_there(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is the file that is open: its last holder may have removed the folder meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def holder(path: Path) -> int | None:
    """The process that holds the lock file ``path``, as the kernel's table of locks says; None where nobody does."""
    try:
        inode, owner = path.stat().st_ino, int(path.read_bytes()[:32] or b"0")
        locks = Path("/proc/locks").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return None
    held = any(" FLOCK " in line and line.split()[-3].endswith(f":{inode}") for line in locks)
    return owner if held else None
