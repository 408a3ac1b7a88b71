"""The figures of a row as cells of a table on the terminal, and tables of plain texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from quern.core.results import Row
from quern.core.text.language import gettext
from quern.core.text.units import bytes_text, percent_text, seconds_text

if TYPE_CHECKING:
    from quern.evaluation.measures.base import Measure

NOT_MEASURED = "-"
UNLIMITED = 10_000
"""Characters of a line that nothing breaks."""


@dataclass(frozen=True)
class TableColumn:
    """A column of a table on the terminal whose lines are rows of results."""

    heading: str
    """Broken at spaces on a terminal."""
    cell: Callable[[Row], str]
    timed: bool = False
    """Whether other programs may have disturbed it."""


def size(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    return NOT_MEASURED if count is None else bytes_text(count)


def percent(fraction: float | None) -> str:
    """A share of 1."""
    return NOT_MEASURED if fraction is None else percent_text(fraction)


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it."""
    return NOT_MEASURED if seconds is None else seconds_text(seconds)


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or the sign for what was not measured."""
    return NOT_MEASURED if value is None else format(value, form)


def interval(limits: tuple[float, float] | None, form: str) -> str:
    """Lower and upper end."""
    if limits is None:
        return NOT_MEASURED
    return gettext("{low} to {high}", low=format(limits[0], form), high=format(limits[1], form))


def comparison_columns() -> list[TableColumn]:
    """The columns of a comparison: the name and every measure that is shown there."""
    return [TableColumn(gettext("name"), lambda row: row.name), *_columns("comparison")]


def further_columns() -> list[TableColumn]:
    """What is shown of a single row beside these."""
    return _columns("row")


def _columns(where: str) -> list[TableColumn]:
    from quern.evaluation.measures.base import all_measures

    return [column for measure in all_measures() if measure.terminal == where for column in _columns_of(measure)]


def _columns_of(measure: Measure) -> Iterator[TableColumn]:
    title = gettext(measure.title)
    if measure.shown_unit:
        title = gettext("{title}, {unit}", title=title, unit=measure.shown_unit)
    writer = {"bytes": size, "fraction": percent, "s": duration}.get(measure.unit, partial(number, form=measure.form))
    yield TableColumn(
        gettext(measure.heading) or title, lambda row: writer(measure.value(row)), measure.stage == "rounds"
    )
    if measure.interval_heading:
        yield TableColumn(gettext(measure.interval_heading), lambda row: interval(measure.range(row), measure.form))


def heading(column: TableColumn) -> str:
    """The heading on one line."""
    return column.heading.replace("- ", "").replace("/ ", "/")


def add(table: Table, *texts: str | Text, style: str | None = None) -> None:
    """A row of plain texts; strings as such would be read as markup."""
    table.add_row(*(Text(text) if isinstance(text, str) else text for text in texts), style=style)


class WholeTable(Table):
    """A table that never breaks a word: where the terminal is narrower than that takes, its lines run on."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(max_width=UNLIMITED)
        for column in self.columns:
            cells = [column.header, *column.cells]
            column.min_width = max(Measurement.get(console, unlimited, cell).minimum for cell in cells)
        least = self.__rich_measure__(console, unlimited).minimum
        yield from super().__rich_console__(console, options.update(max_width=max(options.max_width, least)))


def table(headings: Sequence[str], right: Iterable[int] = (), gap: int = 2) -> Table:
    """An empty table; the columns at the places ``right`` are aligned to the right, ``gap`` characters between all."""
    made = WholeTable(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False)
    to_the_right = set(right)
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="right" if index in to_the_right else "left", overflow="fold")
    return made
