"""The folder of a comparison: what quern may replace in it, and one process at a time.

``results.json``, ``report.html``, ``artifacts/<row>`` with a record ``artifacts/<row>.json`` each, and ``cache/``. Whatever
else lies there is the user's and stays; whatever has one of these names must have been written by quern.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quern.checkpoint.files import explain_write_errors
from quern.checkpoint.jobs.lock import acquire
from quern.checkpoint.jobs.output_place import output_file, output_folder
from quern.comparison.own_files import check_cache, is_record, is_results, mark_cache, not_ours
from quern.pipeline.output import output_target
from quern.report.html import is_report


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
                raise not_ours(folder)
        check_cache(self.cache)
        for row in (*ours, *others):
            record = self.artifacts / f"{row}.json"
            if os.path.lexists(record) and not is_record(record):
                raise not_ours(record)
        for row in ours:
            output_target(self.artifacts / row, model, fresh)
        for row in others:
            folder = self.artifacts / row
            if os.path.lexists(folder) and not is_record(self.artifacts / f"{row}.json"):
                raise not_ours(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else's comparison writes here meanwhile. Raises ``UserError`` when one does."""
        with explain_write_errors(self.cache, 0):
            lock = acquire(self.cache / "lock", self.path)
        try:
            with explain_write_errors(self.cache, 0):
                mark_cache(self.cache)
            yield
        finally:
            os.close(lock)
