"""Where a command may write: tried out before the work, so that nothing is refused after it.

A folder that does not exist yet is made beside the work and appears by one rename. One that exists (an empty folder, a
mount point) is kept as it is: the work folder lies inside it, and its files are moved in one by one. Symbolic links are
followed first: what they point to is written, and the links stay.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quern.checkpoint.files import explain_write_errors, write_bytes
from quern.core.errors import UserError
from quern.core.text.language import gettext, translatable

BESIDE = ".quern-work"
"""Ending of the work folder beside an output folder, and the name of the one inside."""
_PROBE = ".quern-probe-"
_HOUSEKEEPING = (BESIDE, f"{BESIDE}.removing", "lost+found")
"""Names that an output folder may hold before anything is written: quern's own, and what a new file system comes with."""
_NO_NEW_FILE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class OutputFolder:
    """A folder to write: its absolute ``path`` without links, and where the ``work`` for it is kept."""

    path: Path
    work: Path

    @property
    def inside(self) -> bool:
        """Whether the work folder lies inside the output folder."""
        return self.work.parent == self.path

    def entries(self) -> list[str]:
        """Names in the output folder, sorted, without housekeeping; empty where it does not exist."""
        with explain_write_errors(self.path, 0):
            names = os.listdir(self.path) if self.path.is_dir() else []
        return sorted(name for name in names if name not in _HOUSEKEEPING and not name.startswith(_PROBE))

    def refuse_others(self, own: Collection[str], advice: str = translatable("Choose another output folder")) -> None:
        """Raise ``UserError`` for the first entry that is not among ``own``."""
        others = [name for name in self.entries() if name not in own]
        if others:
            more = gettext(" and {count} more", count=len(others) - 1) if others[1:] else ""
            raise UserError(
                gettext(
                    "{path} holds {name!r}{more}, which quern did not write. {advice}",
                    path=self.path,
                    name=others[0],
                    more=more,
                    advice=gettext(advice),
                )
            )

    def tried(self) -> OutputFolder:
        """This place, once all that publishing will do was tried in it, and nothing left behind.

        Where the work folder cannot lie beside (its name is too long there, or a folder cannot be renamed), it is put
        inside. Raises ``UserError`` where neither is possible.
        """
        with explain_write_errors(self.path, 0):
            if self.inside:
                _try_inside(self.path) if self.path.is_dir() else _try_new(self.path)
                return self
            try:
                _try_beside(self.path)
            except OSError:
                with suppress(OSError):
                    _try_new(self.path)
                    return OutputFolder(self.path, self.path / BESIDE)
                raise
            return self


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its absolute ``path`` without links, and where the ``work`` for it is kept."""

    path: Path
    work: Path

    @classmethod
    def of(cls, given: str | Path, model: str | Path, is_ours: Callable[[Path], bool]) -> OutputFile:
        """Where the file ``given`` is, tried out by ``output_file``. Raises ``UserError``, for the ``model`` itself too."""
        path = resolved(given)
        if path == resolved(model):
            raise UserError(gettext("the output file {path} is the model itself. Choose another output", path=path))
        path = output_file(given, is_ours)
        return cls(path, path.with_name(f"{path.name}{BESIDE}"))


def output_folder(given: str | Path, model: str | Path | None = None) -> OutputFolder:
    """Where the folder ``given`` is, and where the work for it goes. Nothing is written; ``tried`` tries it.

    Raises ``UserError`` for a path that is no folder, cannot be one, or is the ``model`` (a path or a Hub id) itself.
    """
    path = resolved(given)
    with explain_write_errors(path, 0):
        status = _status(path)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise UserError(gettext("{path} exists and is no folder. Choose another output folder", path=path))
    if model is not None and path == resolved(model):
        raise UserError(
            gettext("the output folder {path} is the model itself. Choose another output folder", path=path)
        )
    beside = path.parent / f"{path.name}{BESIDE}"
    if path.name and _possible_name(beside) and (status is None or beside.is_dir()):  # or to be continued there
        return OutputFolder(path, beside)
    return OutputFolder(path, path / BESIDE)


def output_file(given: str | Path, is_ours: Callable[[Path], bool]) -> Path:
    """Where the file ``given`` is (absolute, links followed), once it is clear that it may and can be written.

    An existing file is replaced if it is empty or ``is_ours`` says that quern wrote it. Raises ``UserError`` for every other
    one, for folders and special files, and where nothing can be written.
    """
    path = resolved(given)
    with explain_write_errors(path, 0):
        status = _status(path)
        if os.fspath(given).endswith(os.sep) or (status is not None and stat.S_ISDIR(status.st_mode)):
            raise UserError(
                gettext(
                    "{path!r} is a folder, and a file is to be written. Add the file's name to it",
                    path=os.fspath(given),
                )
            )
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise UserError(
                gettext("{path} exists and is not a regular file. Choose another name for the output", path=path)
            )
        if status is not None and status.st_size > 0 and not is_ours(path):
            raise UserError(
                gettext("{path} exists and was not written by quern. Move it away or choose another output", path=path)
            )
        try:
            _try_file(path)
        except OSError:
            if status is None or not os.access(path, os.W_OK):
                raise
    return path


def write_output(path: Path, data: bytes) -> None:
    """Write a file that ``output_file`` allowed: whole or not at all wherever the folder takes a new file.

    A file that can only be written in place (it is mounted by itself, or its folder is read-only) is.
    """
    try:
        write_bytes(path, data)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_NEW_FILE and os.access(path, os.W_OK) and path.is_file():
            with explain_write_errors(path, len(data)), open(path, "r+b") as file:
                file.write(data)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        else:
            raise


def resolved(given: str | Path) -> Path:
    """``given`` as an absolute path: ``~`` is the home folder, links are followed. Raises ``UserError`` for no path."""
    text = os.fspath(given)
    if not text or "\0" in text:
        raise UserError(gettext("{text!r} is no path to write to. Give the path of a file or folder", text=text))
    return Path(os.path.realpath(os.path.expanduser(text)))


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(folder for folder in path.parents if os.path.lexists(folder))


def _possible_name(work: Path) -> bool:
    """Whether a work folder may have this name, and the longer one under which it is deleted."""
    try:
        os.lstat(f"{work}.removing")
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def _try_new(path: Path) -> None:
    """That ``path``, which does not exist, can be made and written into."""
    if not path.parent.is_dir():
        _try_file(path)
        return
    os.mkdir(path)
    try:
        _try_inside(path)
    finally:
        os.rmdir(path)


def _try_beside(path: Path) -> None:
    """A file in a folder with the longest name that the work folder will have, and that folder's rename."""
    folder = _existing(path)
    made = folder / f"{_PROBE}{secrets.token_hex(4)}"
    # With the name itself: file systems differ in what they allow.
    moved = folder / f"{path.name}{BESIDE}.removing.{secrets.token_hex(2)}"
    os.mkdir(made)
    try:
        _write_probe(made / "file")
        os.rename(made, moved)
    finally:
        for place in (made, moved):
            with suppress(OSError):
                (place / "file").unlink(missing_ok=True)
                place.rmdir()


def _try_inside(path: Path) -> None:
    """A file in a folder inside ``path``, and its move to where an artifact's files go."""
    made = path / f"{_PROBE}{secrets.token_hex(4)}"
    moved = path / f"{made.name}-moved"
    os.mkdir(made)
    try:
        _write_probe(made / "file")
        os.rename(made / "file", moved)
    finally:
        with suppress(OSError):
            moved.unlink(missing_ok=True)
            (made / "file").unlink(missing_ok=True)
            made.rmdir()


def _try_file(path: Path) -> None:
    """A temporary file where ``path`` will be, and its rename within the folder."""
    folder = _existing(path)
    made = folder / f"{_PROBE}{secrets.token_hex(4)}"
    try:
        _write_probe(made)
        os.rename(made, folder / f"{made.name}-moved")
    finally:
        for place in (made, folder / f"{made.name}-moved"):
            with suppress(OSError):
                place.unlink(missing_ok=True)


def _write_probe(path: Path) -> None:
    """A file of one byte, on the disk: a full disk takes the name and not the byte."""
    with open(path, "xb") as file:
        file.write(b"\0")
        file.flush()
        os.fsync(file.fileno())
