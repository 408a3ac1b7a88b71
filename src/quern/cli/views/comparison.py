"""A comparison on the terminal: its table, where each row stands, what disturbed it, and what could not be made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from quern.advisor.deployment import has_other_tools
from quern.advisor.placement import Placement, placements
from quern.cli.views.columns import TableColumn, add, comparison_columns, table
from quern.core.results import Results, Row
from quern.core.text.language import gettext
from quern.report.wording import (
    failures_text,
    load_text,
    protocol_text,
    scale_text,
    tool_text,
    under_foreign_load,
)

EDGES = 2
"""Characters that a table takes beside its columns."""
NAME_WIDTH = 36
"""Longer names take several lines."""
PLACES = {"dominated": "dominated", "unquantized": "", "not placed": "-"}
"""Kinds of places that are not written as they are called."""


class Comparison:
    """The rows as a table; columns that the terminal is too narrow for follow in a further table of the same rows."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._other_tools = has_other_tools(results.rows)
        self._places = dict(zip((row.name for row in results.rows), placements(results.rows), strict=False))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ways = [(whole, gap) for whole in (True, False) for gap in (2, 1)]
        layouts = [(self._tables(options.max_width, whole, gap), gap) for whole, gap in ways]
        tables, gap = min(layouts, key=lambda layout: len(layout[0]))
        for columns in tables:
            yield self._table(columns, gap)

    def _table(self, columns: Sequence[TableColumn], gap: int) -> Table:
        headings = [_broken(column.heading) for column in columns]
        made = table(headings, right=range(1, len(columns)), gap=gap)
        for row in self._results.rows:
            chosen = row.name == self._results.recommendation.choice
            cells = [Text(column.cell(row)) for column in columns]
            if self._other_tools:
                cells[0].append(f"\n{tool_text(row, self._results.quern_version)}", style="not bold dim")
            add(made, *cells, style="bold green" if chosen else None)
        return made

    def _tables(self, width: int, whole: bool, gap: int) -> list[list[TableColumn]]:
        """All columns, in as many tables as it takes for each to be no wider than ``width``; each begins with the names,
        the long ones ``whole`` or in parts."""
        names, *others = map(self._marked, comparison_columns())
        name = TableColumn(names.heading, lambda row: names.cell(row) if whole else _in_parts(names.cell(row)))
        others.append(TableColumn(gettext("place"), self._place))
        tables, room = [[name]], width - EDGES - self._width(name)
        for column in others:
            taken = self._width(column) + gap
            if taken > room and len(tables[-1]) > 1:
                tables.append([name])
                room = width - EDGES - self._width(name)
            tables[-1].append(column)
            room -= taken
        return tables

    def _width(self, column: TableColumn) -> int:
        texts = [_broken(column.heading), *(column.cell(row) for row in self._results.rows)]
        if column.heading == gettext("name") and self._other_tools:
            texts += [tool_text(row, self._results.quern_version) for row in self._results.rows]
        return max(cell_len(line) for text in texts for line in text.split("\n"))

    @staticmethod
    def _marked(column: TableColumn) -> TableColumn:
        """Timings with a mark where other programs disturbed them."""
        if not column.timed:
            return column
        return TableColumn(column.heading, lambda row: column.cell(row) + "*" * under_foreign_load(row))

    def _place(self, row: Row) -> str:
        kind = self._places[row.name].kind
        return gettext(PLACES.get(kind, kind))


def _in_parts(name: str) -> str:
    """A long name on several lines, broken behind hyphens."""
    lines = [""]
    for part in re.findall(r"[^-]*-|[^-]+$", name):
        if lines[-1] and len(lines[-1]) + len(part) > NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _broken(heading: str) -> str:
    """The heading on several lines; a percent sign stays with its number."""
    return heading.replace(" ", "\n").replace("\n%", " %")


def remarks(results: Results) -> Iterator[Text]:
    """Lines below the table: how much was measured, foreign load, places, failures."""
    if results.protocol is not None:
        yield Text(protocol_text(results.protocol, results.rows), style="dim")
    disturbed = [
        gettext("{name} ({load})", name=row.name, load=load_text(row))
        for row in results.rows
        if under_foreign_load(row)
    ]
    if disturbed:
        yield Text(gettext("* timed under foreign load: {rows}", rows=gettext(", ").join(disturbed)), style="yellow")
    yield from _places(results.rows, placements(results.rows))
    for failure in failures_text(results):
        yield Text(gettext("Not made: {failure}", failure=failure), style="red")


def _places(rows: Sequence[Row], places: Sequence[Placement]) -> Iterator[Text]:
    if not any(row.kind != "unquantized" for row in rows):
        return
    yield Text()
    yield Text(gettext("Places. {scale}", scale=scale_text(rows)), style="dim")
    for row, place in zip(rows, places, strict=True):
        says_itself = place.kind in ("dominated", "unquantized")
        reason = place.reason
        if not says_itself:
            reason = gettext("{place}: {reason}", place=gettext(place.kind), reason=reason)
        yield Text("  " + gettext("{name}: {reason}", name=row.name, reason=reason))
