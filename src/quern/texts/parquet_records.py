"""Records of Parquet, through pyarrow, an optional extra; row group by row group."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quern.core.errors import BadFileError, UserError
from quern.texts.records import TAKEN

_ROWS = 256
"""Rows that are turned into Python's values at once."""


def parquet_records(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file. Raises ``UserError`` without pyarrow, ``BadFileError`` for a damaged file."""
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("pyarrow"):
            raise
        raise UserError(
            f"{path}: Parquet needs pyarrow, which is not installed. Run: pip install 'quern[parquet]', or give JSON lines"
        ) from None
    try:
        with parquet.ParquetFile(str(path), pre_buffer=False) as file:
            columns = [name for name in file.schema_arrow.names if name.strip().casefold() in TAKEN]
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns or None):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BadFileError(
            path, f"is not Parquet that can be read: {first}", "Download or copy the file again"
        ) from None
