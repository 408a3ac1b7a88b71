"""The measures as the report's columns: which of them, and how their values are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from quern.core.results import Results, Row
from quern.core.text.units import bytes_text, percent_text, seconds_text, significant
from quern.evaluation.measures.base import Measure, all_measures, range_lines
from quern.report.tools import has_tools_view

Kind = Literal["bytes", "number", "percent", "seconds"]
"""What the page's own script writes axis ticks by."""
_KINDS: dict[str, Kind] = {"bytes": "bytes", "fraction": "percent", "s": "seconds"}


def columns_of(results: Results) -> list[Measure]:
    """The measures that these results may have figures of, in the order of the columns."""
    beside_tools = has_tools_view(results)
    return [
        found for found in all_measures() if found.in_report and (beside_tools or not found.only_beside_other_tools)
    ]


def kind_of(measure: Measure) -> Kind:
    """How its values are written; ``number``: with the measure's digits, the unit in the heading."""
    return _KINDS.get(measure.unit, "number")


def text_of(measure: Measure, row: Row) -> str | None:
    """The value with its unit where the unit depends on the size, else without; None where not measured."""
    value = measure.value(row)
    return None if value is None else _writer(measure)(value)


def detail_of(measure: Measure, row: Row) -> list[str]:
    """The lines below the value."""
    if measure.detail is not None:
        return measure.detail(row)
    return range_lines(measure.range(row), _writer(measure))


def _writer(measure: Measure) -> Callable[[float], str]:
    writers: dict[Kind, Callable[[float], str]] = {
        "bytes": bytes_text,
        "number": lambda number: significant(number, measure.digits),
        "percent": percent_text,
        "seconds": seconds_text,
    }
    return writers[kind_of(measure)]
