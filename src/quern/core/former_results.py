"""What files of earlier versions leave out: fields that rows have had since, from what those versions wrote instead."""

from __future__ import annotations

import re
from typing import Any

_DRIFT_NOTE = re.compile(r"the unquantized model decoded at ([0-9]+(?:\.[0-9]+)?) of its speed in the first group")
"""How rows from before ``group_speed`` say it."""


def completed(row: Any) -> Any:
    """The plain data of a row with ``kind`` and ``group_speed``; anything that is not a row comes back as it is.

    Before rows had a ``kind``, the unquantized model was the one without a recipe, and ``tool`` told other tools' rows
    apart. Before they had ``group_speed``, a note said it where it was far from 1.
    """
    if not isinstance(row, dict):
        return row
    found = {"kind": _kind(row), **row}
    if found.get("group_speed") is None and (speed := _noted_speed(row.get("notes"))) is not None:
        found["group_speed"] = speed
    return found


def _kind(row: dict[str, Any]) -> str:
    if row.get("tool") is not None:
        return "peer"
    return "unquantized" if row.get("recipe") is None else "quern"


def _noted_speed(notes: Any) -> float | None:
    texts = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return next((float(match[1]) for text in texts if (match := _DRIFT_NOTE.search(text))), None)
