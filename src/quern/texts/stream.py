"""A file's characters, read by pieces: gzip, byte order marks and other encodings are seen from its first bytes."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from quern.core.errors import BadFileError
from quern.core.text.encoding import foreign_encoding, not_utf8

CHUNK = 1024 * 1024
"""Bytes that are read at once."""
LINE_LIMIT = 64 * 1024 * 1024
"""Characters of a line, or of a record, beyond which it is not held as a whole."""
_GZIP = b"\x1f\x8b"
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7z",
}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed where it is gzip. Raises ``BadFileError`` also while it is read."""
    try:
        # Opening a pipe without O_NONBLOCK would wait for a writer that may never come.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BadFileError(path, "is not a regular file", "A text is read more than once: put it into a file")
        with os.fdopen(descriptor, "rb") as file:
            packed = file.peek(2)[:2] == _GZIP
            with gzip.GzipFile(fileobj=file) if packed else io.BytesIO() as unpacked:
                yield cast(BinaryIO, unpacked) if packed else file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFileError(path, f"is damaged gzip: {error}", "Download or copy the file again") from None
    except OSError as error:
        raise BadFileError(path, f"cannot be read: {error.strerror or error}", "Give a UTF-8 text file") from None


def first_bytes(path: Path, count: int = CHUNK) -> bytes:
    """The first ``count`` bytes, decompressed. Raises ``BadFileError`` for a file in another compression."""
    with opened(path) as file:
        head = file.read(count)
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise BadFileError(path, f"is compressed by {name}; of compressed texts only gzip is read", "Unpack it")
    return head


def characters(path: Path, *, translate: bool = False) -> Iterator[str]:
    """The text in strings of about a megabyte, without a byte order mark.

    ``translate``: line ends of other systems become ``\\n``. Raises ``BadFileError`` for what is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True) if translate else utf8
    head, read = b"", 0
    with opened(path) as file:
        while True:
            chunk = file.read(CHUNK)
            if not read:
                head = chunk
                if foreign_encoding(head):
                    raise not_utf8(path, head, None)
            read += len(chunk)
            if b"\0" in chunk:
                raise not_utf8(path, head, None)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise not_utf8(path, head, read - len(error.object) + error.start) from None
            if text:
                yield text
            if not chunk:
                return


def lines(strings: Iterator[str]) -> Iterator[str]:
    """The lines of a text, each with its ``\\n``; one of more than ``LINE_LIMIT`` characters comes in parts."""
    rest = ""
    for string in strings:
        parts = (rest + string).split("\n")
        rest = parts.pop()
        for part in parts:
            yield part + "\n"
        if len(rest) > LINE_LIMIT:
            yield rest
            rest = ""
    if rest:
        yield rest
