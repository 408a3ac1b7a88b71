"""A comparison on the terminal: its table, where each row stands, what disturbed it, and what could not be made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from quern.advisor.deployment import has_other_tools
from quern.advisor.placement import Placement, placements
from quern.cli.columns import COLUMNS, Column, add, table
from quern.core.results import Results, Row
from quern.report.wording import (
    failures_text,
    load_text,
    protocol_text,
    scale_text,
    tool_text,
    under_foreign_load,
)

WIDE = 120
"""Characters of a terminal from which columns stand further apart."""
EDGES = 2
"""Characters that a table takes beside its columns."""
NAME_WIDTH = 36
"""Longer names may be broken rather than push columns out."""
PLACES = {"dominated": "dominated", "unquantized": "", "not placed": "-"}
"""Kinds of places that are not written as they are called."""


class Comparison:
    """The rows as a table of as many columns as the terminal is wide enough for."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._other_tools = has_other_tools(results.rows)
        self._places = dict(zip((row.name for row in results.rows), placements(results.rows), strict=False))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gap = 2 if options.max_width >= WIDE else 1
        columns = self._fitting(options.max_width, gap)
        headings = [column.heading.replace(" ", "\n") for column in columns]
        made = table(headings, right=range(1, len(columns)), gap=gap)
        for row in self._results.rows:
            chosen = row.name == self._results.recommendation.choice
            cells = [Text(column.cell(row)) for column in columns]
            if self._other_tools:
                cells[0].append(f"\n{tool_text(row, self._results.quern_version)}", style="not bold dim")
            add(made, *cells, style="bold green" if chosen else None)
        yield made

    def _fitting(self, width: int, gap: int) -> list[Column]:
        """The columns without those that must go for the table to be no wider than ``width``."""
        place = Column("place", self._place, dispensable=4 if self._other_tools else 8)
        columns = [*(self._marked(column) for column in COLUMNS), place]
        while sum(map(self._width, columns)) + gap * (len(columns) - 1) + EDGES > width:
            least = max(columns, key=lambda column: column.dispensable)
            if least.dispensable == 0:
                break
            columns.remove(least)
        return columns

    def _width(self, column: Column) -> int:
        texts = [column.heading.replace(" ", "\n"), *(column.cell(row) for row in self._results.rows)]
        if column.heading == "name" and self._other_tools:
            texts += [tool_text(row, self._results.quern_version) for row in self._results.rows]
        longest = max(len(line) for text in texts for line in text.split("\n"))
        return min(longest, NAME_WIDTH) if column.heading == "name" else longest

    @staticmethod
    def _marked(column: Column) -> Column:
        """Speeds with a mark where other programs disturbed them."""
        if "tok/s" not in column.heading:
            return column
        return Column(
            column.heading,
            lambda row: column.cell(row) + "*" * under_foreign_load(row),
            dispensable=column.dispensable,
        )

    def _place(self, row: Row) -> str:
        kind = self._places[row.name].kind
        return PLACES.get(kind, kind)


def remarks(results: Results) -> Iterator[Text]:
    """Lines below the table: how much was measured, foreign load, places, failures."""
    if results.protocol is not None:
        yield Text(protocol_text(results.protocol), style="dim")
    disturbed = [f"{row.name} ({load_text(row)})" for row in results.rows if under_foreign_load(row)]
    if disturbed:
        yield Text(f"* timed under foreign load: {', '.join(disturbed)}", style="yellow")
    yield from _places(results.rows, placements(results.rows))
    for failure in failures_text(results):
        yield Text(f"Not made: {failure}", style="red")


def _places(rows: Sequence[Row], places: Sequence[Placement]) -> Iterator[Text]:
    if not any(row.recipe is not None for row in rows):
        return
    yield Text()
    yield Text(f"Places. {scale_text(rows)}", style="dim")
    for row, place in zip(rows, places, strict=True):
        says_itself = place.kind in ("dominated", "unquantized")
        reason = place.reason if says_itself else f"{place.kind}: {place.reason}"
        yield Text(f"  {row.name}: {reason}")
