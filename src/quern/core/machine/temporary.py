"""Temporary folders and files, and what to do where there is no room for them: no option names their place, TMPDIR does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from quern.core.errors import UserError
from quern.core.text.language import gettext, translatable

_PREFIX = "quern-temporary-"
ELSEWHERE = translatable("set the environment variable TMPDIR to a folder on a disk with more room")
"""The advice where a temporary file did not fit."""


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A new folder that is deleted at the end. Raises ``UserError`` where none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{purpose}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _refused(error) from error
    with folder as path:
        yield Path(path)


def temporary_file() -> IO[bytes]:
    """A file without a name, open for writing and reading. Raises ``UserError`` where none can be made."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise _refused(error) from error


def is_temporary(path: Path) -> bool:
    """Whether ``path`` lies in a folder that ``temporary_folder`` made."""
    return any(part.startswith(_PREFIX) for part in path.absolute().parts)


def _refused(error: OSError) -> UserError:
    told = {"reason": error.strerror or error, "elsewhere": gettext(ELSEWHERE)}
    return UserError(gettext("no temporary files can be written: {reason}. Free some space, or {elsewhere}", **told))
