"""The folder of a comparison: what quern may replace in it, and one process at a time.

``results.json``, ``report.html``, ``artifacts/<row>`` with a record ``artifacts/<row>.json`` each, and ``cache/``. Whatever
else lies there is the user's and stays; whatever has one of these names must have been written by quern.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from quern.checkpoint.files import explain_write_errors, read_json
from quern.checkpoint.lock import acquire
from quern.checkpoint.output_place import output_file, output_folder
from quern.core.errors import BadFileError, UserError
from quern.pipeline.output import output_target
from quern.report.html import is_report

_RESULTS_KEYS = {"metrics_version", "quern_version", "rows"}
_RECORD_KEY = "artifact_sha256"
_RESULTS_LIMIT = 256 << 20
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# A cache of quern compare (https://bford.info/cachedir/).\n"
"""What tells programs that make backups that the folder can be made again, and quern that it is its own."""
_CACHED = (
    "windows.npz",
    "options.npz",
    "measured",
    "lock",
    "reference-*",
    "token-weights-*",
    "calibration-*",
    ".*.tmp",
)
"""What lies in a cache folder that was made before there was a tag."""


class ComparisonFolder:
    """Where a comparison writes; ``path`` is absolute and without links."""

    def __init__(self, given: str | Path, model: str | Path) -> None:
        self.path = output_folder(given, model).path
        self.results, self.report = self.path / "results.json", self.path / "report.html"
        self.artifacts, self.cache = self.path / "artifacts", self.path / "cache"

    def check(self, model: str | Path, ours: Sequence[str], others: Sequence[str], fresh: bool) -> None:
        """Refuse to touch what is not quern's, and places that cannot be written, before anything is done.

        ``ours`` are the rows that quern makes, ``others`` those of other tools. Raises ``UserError``.
        """
        self.results = output_file(self.results, is_results)
        self.report = output_file(self.report, is_report)
        for folder in (self.artifacts, self.cache):
            if os.path.lexists(folder) and not folder.is_dir():
                raise _not_ours(folder)
        self._check_cache()
        for row in (*ours, *others):
            record = self.artifacts / f"{row}.json"
            if os.path.lexists(record) and not is_record(record):
                raise _not_ours(record)
        for row in ours:
            output_target(self.artifacts / row, model, fresh)
        for row in others:
            folder = self.artifacts / row
            if os.path.lexists(folder) and not is_record(self.artifacts / f"{row}.json"):
                raise _not_ours(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else's comparison writes here meanwhile. Raises ``UserError`` when one does."""
        with explain_write_errors(self.cache, 0):
            lock = acquire(self.cache / "lock", self.path)
        try:
            with explain_write_errors(self.cache, 0):
                (self.cache / _TAG).write_bytes(_TAG_TEXT)
            yield
        finally:
            os.close(lock)

    def _check_cache(self) -> None:
        if not self.cache.is_dir() or (self.cache / _TAG).is_file():
            return
        with explain_write_errors(self.cache, 0):
            strange = [name for name in os.listdir(self.cache) if not any(fnmatch(name, known) for known in _CACHED)]
        if strange:
            raise _not_ours(self.cache / min(strange))


def is_results(path: Path) -> bool:
    """Whether ``quern compare`` of any version wrote the file."""
    return _has_keys(path, _RESULTS_KEYS)


def is_record(path: Path) -> bool:
    """Whether the file is what a comparison notes beside an artifact."""
    return _has_keys(path, {_RECORD_KEY})


def _has_keys(path: Path, keys: set[str]) -> bool:
    try:
        return keys <= set(read_json(path, _RESULTS_LIMIT))
    except BadFileError:
        return False


def _not_ours(path: Path) -> UserError:
    return UserError(f"{path} exists and was not written by quern. Move it away or choose another output folder")
