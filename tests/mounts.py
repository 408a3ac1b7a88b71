"""File systems for tests, mounted where the system permits it; tests that need one are skipped elsewhere.

The process gets a mount namespace of its own first, so that nothing is left mounted, however it ends.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@functools.cache
def _private_namespace() -> bool:
    new_mounts = 0x00020000  # CLONE_NEWNS of unshare(2)
    try:
        done = ctypes.CDLL(None).unshare(new_mounts) == 0
        return done and subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0
    except (OSError, AttributeError):
        return False


@contextmanager
def mounted(target: Path, *options: str) -> Iterator[Path]:
    """``mount OPTIONS TARGET`` for the length of the block; a folder is made where there is nothing."""
    if not _private_namespace():
        pytest.skip("mounting is not permitted here")
    if not target.exists():
        target.mkdir()
    try:
        done = subprocess.run(["mount", *options, str(target)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


@contextmanager
def tmpfs(target: Path, size: str = "64m") -> Iterator[Path]:
    """An empty file system in memory."""
    with mounted(target, "-t", "tmpfs", "-o", f"size={size}", "none"):
        yield target


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """``folder`` mounted on itself, read-only; disks may be mounted in it afterwards."""
    with mounted(folder, "--bind", str(folder)):
        done = subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("a read-only mount is not permitted here")
        yield folder
