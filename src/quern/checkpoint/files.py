"""Plain files: reads that check the size before they allocate, and writes that are either whole or absent.

Reading is by ``pread`` and never by memory map: mapped pages count towards a process's resident memory, which quern
promises to keep under a cap.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from quern.core.errors import BadFileError, UserError
from quern.core.machine.temporary import ELSEWHERE, is_temporary
from quern.core.text.encoding import foreign_encoding
from quern.core.text.language import gettext, translatable
from quern.core.text.units import bytes_text

JSON_LIMIT = 16 * 1024 * 1024
"""Most bytes of a configuration file; real ones have a few thousand."""
_CHUNK = 1024 * 1024
_AGAIN = translatable("Download or copy the file again")
_LONGEST_NAME = 240
"""Bytes of a file's name that leave room for the ending of a temporary one (Linux: 255)."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER = 1024
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


class InputFile:
    """A regular file, open for reading at given offsets; a context manager.

    ``size`` is the length in bytes at opening. Raises ``BadFileError`` for a path that is missing, not readable, or a
    folder, pipe or device.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            # Opening a pipe without O_NONBLOCK would wait for a writer that may never come.
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise BadFileError(
                path,
                gettext("cannot be read: {reason}", reason=error.strerror),
                gettext("Check the path and its permissions"),
            ) from None
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise BadFileError(path, gettext("is not a regular file"), gettext("Give a file that holds data"))
        self.size = status.st_size

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Read ``len(buffer)`` bytes at ``offset`` into ``buffer`` (bytes, contiguous). Raises ``BadFileError``."""
        done = 0
        while done < len(buffer):
            try:
                # One call moves at most 2 GiB on Linux.
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise BadFileError(
                    self.path,
                    gettext("cannot be read at byte {byte}: {reason}", byte=offset + done, reason=error.strerror),
                    gettext("Check the disk"),
                ) from None
            if count == 0:
                raise BadFileError(
                    self.path,
                    gettext(
                        "is truncated: ends at byte {byte}, {count} bytes early",
                        byte=offset + done,
                        count=len(buffer) - done,
                    ),
                    _AGAIN,
                )
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """The ``length`` bytes at ``offset``; a range beyond the end is refused before anything is allocated."""
        if length > self.size - offset:
            raise BadFileError(
                self.path,
                gettext(
                    "is truncated: {length} bytes are wanted at byte {offset}, but it has {size} bytes",
                    length=length,
                    offset=offset,
                    size=self.size,
                ),
                _AGAIN,
            )
        buffer = bytearray(length)
        self.fill(memoryview(buffer), offset)
        return bytes(buffer)


def refuse_pointer(file: InputFile) -> None:
    """Raise ``BadFileError`` where a file is what git-lfs puts in place of one that it has not downloaded."""
    if file.size <= _LARGEST_POINTER and file.read(0, min(file.size, len(_POINTER))) == _POINTER:
        raise BadFileError(
            file.path,
            gettext("is only a pointer of git-lfs: the repository was cloned without its large files"),
            gettext("Run `git lfs install` and `git lfs pull` in that folder"),
        )


def parse_json_object(path: str | Path, raw: bytes, what: str) -> dict[str, Any]:
    """``raw`` as a JSON object, strictly: UTF-8, no key twice, no NaN or Infinity. ``what`` names it in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadFileError(
                path,
                gettext("{what} names {name} twice", what=what, name=_short(twice)),
                gettext("Each name may occur once"),
            )
        return result

    def refuse(constant: str) -> None:
        raise BadFileError(
            path, gettext("{what} holds {constant}, which is not JSON", what=what, constant=constant), _AGAIN
        )

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        if encoding := foreign_encoding(raw):
            raise BadFileError(
                path, gettext("{what} is {encoding}", what=what, encoding=encoding), gettext("Save it as UTF-8")
            ) from None
        raise BadFileError(
            path,
            gettext("{what} is not UTF-8: {reason} at byte {byte}", what=what, reason=error.reason, byte=error.start),
            _AGAIN,
        ) from None
    except RecursionError:
        raise BadFileError(path, gettext("{what} is nested too deeply", what=what), _AGAIN) from None
    except BadFileError:
        raise
    except ValueError as error:
        if raw.startswith(codecs.BOM_UTF8):  # which libraries that read the same file do not take either
            hint = gettext("Save it as UTF-8 without one")
            raise BadFileError(
                path, gettext("{what} begins with a byte order mark, which JSON must not have", what=what), hint
            ) from None
        raise BadFileError(path, gettext("{what} is not JSON: {error}", what=what, error=error), _AGAIN) from None
    if not isinstance(data, dict):
        raise BadFileError(
            path, gettext("{what} is not a JSON object but a {type}", what=what, type=type(data).__name__), _AGAIN
        )
    return data


def _short(value: object) -> str:
    """``value`` for a message: quoted, control characters escaped, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes. Raises ``BadFileError``."""
    with InputFile(path) as file:
        refuse_pointer(file)
        if file.size > limit:
            raise BadFileError(
                path,
                gettext(
                    "has {size}, more than the {limit} that such a file may have",
                    size=bytes_text(file.size),
                    limit=bytes_text(limit),
                ),
                _AGAIN,
            )
        return parse_json_object(path, file.read(0, file.size), gettext("the file"))


def sha256_into(
    digest: Any,
    path: str | Path,
    *,
    begin: int = 0,
    end: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Feed a file, or its bytes from ``begin`` to ``end``, to a hashlib object; ``advance`` hears of each piece."""
    buffer = memoryview(bytearray(_CHUNK))
    with InputFile(path) as file:
        stop = file.size if end is None else end
        for offset in range(begin, stop, _CHUNK):
            piece = buffer[: min(_CHUNK, stop - offset)]
            file.fill(piece, offset)
            digest.update(piece)
            advance(len(piece))


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    sha256_into(digest, path)
    return digest.hexdigest()


@contextmanager
def explain_write_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn operating system errors of writing ``needed`` bytes to ``path`` into ``UserError`` with the next step."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full(path, needed) from error
        if error.errno == errno.EFBIG:
            raise UserError(
                gettext(
                    "cannot write {path}: no file may be so large there. Raise the limit (`ulimit -f`), or choose a folder "
                    "on a file system that takes large files; what is finished is kept",
                    path=path,
                )
            ) from error
        if error.errno in _NO_PERMISSION:
            raise UserError(
                gettext(
                    "cannot write {path}: {reason}. Choose another folder or change the permissions of this one",
                    path=path,
                    reason=error.strerror,
                )
            ) from error
        told = {"path": path, "reason": error.strerror or error}
        raise UserError(gettext("cannot write {path}: {reason}. Choose another place to write to", **told)) from error


def _full(path: Path, needed: int) -> UserError:
    told = {"path": path, "free": bytes_text(_free_bytes(path.parent)), "advice": room_advice(path)}
    if not needed:
        return UserError(gettext("not enough room to write {path}: {free} are free there. {advice}", **told))
    return UserError(
        gettext(
            "not enough room to write {path}: {needed} are needed and {free} are free there. {advice}",
            needed=bytes_text(needed),
            **told,
        )
    )


def room_advice(path: Path) -> str:
    """What to do where ``path`` does not fit."""
    if is_temporary(path):
        return gettext("Free some space, or {elsewhere}", elsewhere=gettext(ELSEWHERE))
    return gettext("Free some space or choose a folder on another disk; what is finished is kept")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(there for there in (folder, *folder.absolute().parents) if there.exists())).free


@contextmanager
def atomic_output(path: Path, needed: int) -> Iterator[BinaryIO]:
    """A binary file to write ``needed`` bytes to that appears as ``path`` when the block ends without an error.

    The bytes go to ``.NAME.tmp`` in the same folder (created if missing), are synced to the disk and renamed. Raises
    ``UserError`` when the disk is too full (said before the first byte where that can be known) or not writable; the
    temporary file is removed on every error.
    """
    temporary = path.with_name(f".{_shortened(path.name)}.tmp")
    with explain_write_errors(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        if needed > _free_bytes(path.parent):
            raise _full(path, needed)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def _shortened(name: str) -> str:
    """``name`` without its end where a few characters more would be too many for a file's name."""
    return os.fsencode(name)[:_LONGEST_NAME].decode("utf-8", "ignore")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically (see ``atomic_output``)."""
    with atomic_output(path, len(data)) as file:
        file.write(data)


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as indented JSON, atomically; the same data gives the same bytes (keys keep their order)."""
    write_bytes(path, json_bytes(data))


def json_bytes(data: object) -> bytes:
    """What ``write_json`` writes."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sync(path: Path) -> None:
    """Wait until a file's bytes or a folder's entries are on the disk. Raises ``UserError`` when they do not fit."""
    with explain_write_errors(path, 0):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Network and shared file systems have nothing to do for a folder, and some say so.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
                raise
        finally:
            os.close(descriptor)
