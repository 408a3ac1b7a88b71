"""Whether the files of a checkpoint are still those that were opened: a job of days reads them again and again.

What tells is size, time of the last change and inode, looked at before and after every read. A job that goes on holds the
checkpoint to its hash besides (``Checkpoint.sha256``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quern.core.errors import BadFileError
from quern.core.text.units import bytes_text

_BACK = "What was finished is kept. Put the former file back and run the same command again"


@dataclass(frozen=True)
class Stamp:
    """A file at one moment."""

    bytes: int
    changed_ns: int
    """Since the epoch."""
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Of the file that ``path`` leads to. Raises ``OSError``."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    @property
    def text(self) -> str:
        """For messages."""
        return f"{bytes_text(self.bytes)} of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.changed_ns // 10**9))}"


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """Of all files of ``paths`` that are there."""
    return {path: Stamp.of(path) for path in paths if path.is_file()}


def check_unchanged(path: Path, stamps: Mapping[Path, Stamp]) -> None:
    """Raise ``BadFileError`` where the file at ``path`` is not that of its stamp; one without a stamp may change."""
    if (then := stamps.get(path)) is None:
        return
    try:
        now = Stamp.of(path)
    except OSError as error:
        raise BadFileError(
            path, f"was there when the checkpoint was opened, and now: {error.strerror}", _BACK
        ) from None
    if now != then:
        what = f"{then.text} -> {now.text}" if now.text != then.text else "it is another file, or was written meanwhile"
        raise BadFileError(path, f"has changed since the checkpoint was opened: {what}", _BACK)
