"""How far the machine changed its speed between the groups in which two rows were timed.

The unquantized model is timed in every group. A row that was timed while it ran faster, by more than ``DRIFT_LIMIT``, than
beside another row may owe a lead over that row to the machine: it has to lead by more than that to be called faster.
"""

from __future__ import annotations

import re

from quern.core.results import DRIFT_LIMIT, Row
from quern.core.units import percent_text

_NOTE = re.compile(r"the unquantized model decoded at ([0-9]+(?:\.[0-9]+)?) of its speed in the first group")
"""How results say it that were measured before rows had ``group_speed``."""


def group_speed_of(row: Row) -> float:
    """Speed of the unquantized model in the row's group over that in the first one; 1 where the row does not say."""
    if row.group_speed is not None:
        return row.group_speed if row.group_speed > 0 else 1.0
    told = next((float(match[1]) for note in row.notes if (match := _NOTE.search(note))), 1.0)
    return told if told > 0 else 1.0


def favour(row: Row, other: Row) -> float:
    """By how much the machine ran faster for ``row`` than for ``other``; 0 where by no more than the limit, or slower."""
    gain = group_speed_of(row) / group_speed_of(other) - 1
    return gain if gain > DRIFT_LIMIT else 0.0


def favour_text(row: Row, other: Row) -> str:
    """That in words."""
    return f"the machine ran {percent_text(favour(row, other))} faster while {row.name} was timed"
