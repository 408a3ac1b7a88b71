"""How far the machine changed its speed between the groups in which two rows were timed.

The unquantized model is timed in every group. A row that was timed while it ran faster, by more than ``DRIFT_LIMIT``, than
beside another row may owe a lead over that row to the machine: it has to lead by more than that to be called faster.
"""

from __future__ import annotations

from quern.core.results import DRIFT_LIMIT, Row
from quern.core.text.language import gettext
from quern.core.text.units import percent_text


def group_speed_of(row: Row) -> float:
    """Speed of the unquantized model in the row's group over that in the first one; 1 where the row does not say."""
    return row.group_speed if row.group_speed is not None and row.group_speed > 0 else 1.0


def favour(row: Row, other: Row) -> float:
    """By how much the machine ran faster for ``row`` than for ``other``; 0 where by no more than the limit, or slower."""
    gain = group_speed_of(row) / group_speed_of(other) - 1
    return gain if gain > DRIFT_LIMIT else 0.0


def favour_text(row: Row, other: Row) -> str:
    """That the machine ran faster for ``row`` than for another one, and by how much, as a clause."""
    faster = percent_text(favour(row, other))
    return gettext("the machine ran {faster} faster while {name} was timed", faster=faster, name=row.name)
