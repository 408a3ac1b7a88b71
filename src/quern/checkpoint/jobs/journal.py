"""The journal of a work folder: one JSON line for each finished step, appended and never rewritten.

A line is ``{"step": name, "files": {path: [bytes, sha256]}, "data": {...}}``. It is synced to the disk as a whole; one
that a kill tore is cut off when the journal is next read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.checkpoint.files import explain_write_errors, sync

GROWS = ""
"""In place of the SHA-256 of a file to which later steps append."""


@dataclass(frozen=True)
class Record:
    """A finished step: its files (path inside the work folder to size in bytes and SHA-256, or ``GROWS``) and its data."""

    files: dict[str, tuple[int, str]]
    data: dict[str, Any]


def read_journal(path: Path) -> dict[str, Record]:
    """The finished steps; of a step recorded twice the last record. A torn line and what follows it are cut off."""
    raw = path.read_bytes() if path.is_file() else b""
    steps, good = parse_journal(raw)
    if good != len(raw):
        with open(path, "r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())
    return steps


def parse_journal(raw: bytes) -> tuple[dict[str, Record], int]:
    """The finished steps in the bytes of a journal, and how many bytes come before the first line that is torn."""
    steps: dict[str, Record] = {}
    good = 0
    while (end := raw.find(b"\n", good)) >= 0:
        try:
            line = json.loads(raw[good:end])
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in line["files"].items()}
            steps[str(line["step"])] = Record(files, dict(line["data"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        good = end + 1
    return steps, good


def append_record(path: Path, step: str, files: Mapping[str, tuple[int, str]], data: Mapping[str, Any]) -> Record:
    """Write one line and return it as it will be read. Raises ``UserError`` for a full disk; no torn line stays."""
    text = json.dumps({"step": step, "files": files, "data": data}, allow_nan=False)
    raw = text.encode() + b"\n"
    with explain_write_errors(path, len(raw)), open(path, "ab") as journal:
        begin = journal.tell()
        try:
            journal.write(raw)
            journal.flush()
            os.fsync(journal.fileno())
        except OSError:
            # A full disk may have taken a part of the line; the next line must not be glued to it.
            os.ftruncate(journal.fileno(), begin)
            raise
    sync(path.parent)
    return Record(dict(files), json.loads(text)["data"])
