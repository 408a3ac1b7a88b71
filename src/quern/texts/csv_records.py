"""Records of comma- or tab-separated values: the first row names the fields."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from quern.core.errors import BadFileError
from quern.texts.stream import LINE_LIMIT, lines

_HINT = "Give a table whose first row names the fields, JSON lines, or plain text as .txt"
_DELIMITERS = ",\t;"


def csv_records(path: Path, strings: Iterator[str], tabs: bool = False) -> Iterator[dict[str, str]]:
    """The rows in ``strings`` by the names in the first one; ``tabs`` between the fields, or what the first row has.

    Raises ``BadFileError`` with the number of the line.
    """
    rows = lines(strings)
    first = next(rows, "")
    delimiter = "\t" if tabs else max(_DELIMITERS, key=first.count)
    number = 1

    def counted() -> Iterator[str]:
        nonlocal number
        yield first
        for row in rows:
            number += 1
            yield row

    limit = csv.field_size_limit(LINE_LIMIT)
    try:
        reader = csv.reader(counted(), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise BadFileError(path, "names a field twice in its first row", _HINT)
        for row in reader:
            if len(row) > len(names):
                raise BadFileError(
                    path, f"line {number} has {len(row)} fields, the first row names {len(names)}", _HINT
                )
            if row:
                yield dict(zip(names, [*row, *[""] * (len(names) - len(row))]))
            csv.field_size_limit(LINE_LIMIT)
    except csv.Error as error:
        raise BadFileError(path, f"line {number} is no row of a table: {error}", _HINT) from None
    finally:
        csv.field_size_limit(limit)
