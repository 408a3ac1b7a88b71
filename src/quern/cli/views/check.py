"""What a person sees of a check and of the matrix of pairs. No label is made here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add
from quern.cli.views.columns import table as plain_table
from quern.core.text.language import gettext
from quern.core.text.units import significant
from quern.pipeline.stacking.tensor_parallel import told

if TYPE_CHECKING:
    from quern.core.stacking import Label, Part
    from quern.pipeline.stacking.check import CheckReport
    from quern.pipeline.stacking.matrix import Cell, Matrix

STYLES: dict[Label, str] = {"works": "green", "degrades": "yellow", "refuses": "red"}
SIGNS: dict[Label, str] = {"works": "+", "degrades": "~", "refuses": "x"}


def report(found: CheckReport) -> RenderableType:
    """The label, why, and which pairs lose."""
    asked = found.recipe
    if found.runtime:
        asked = gettext("{recipe} for {runtime}", recipe=asked, runtime=found.runtime)
    if found.cache:
        asked = gettext("{recipe}, cache {cache}", recipe=asked, cache=found.cache)
    title = Text(gettext("{recipe}: ", recipe=asked)).append(gettext(found.label), style=f"bold {STYLES[found.label]}")
    lines = [Text(gettext("parts: {parts}", parts=gettext(", ").join(map(str, found.parts))), style="dim")]
    lines += [Text(gettext("refused: {problem}", problem=problem)) for problem in found.problems]
    for cell in found.degrading:
        pair = gettext("{first} with {second}", first=cell.first, second=cell.second)
        lines.append(Text(gettext("{name}: {reason}", name=pair, reason=cell.answer.reason) + loss(cell)))
    for one in found.tensor_parallel:
        lines.append(Text(gettext("tensor parallel {size}: {said}", size=one.size, said=told(one))))
    lines += [Text(gettext("note: {note}", note=note), style="dim") for note in found.notes]
    return Group(title, *lines)


def loss(cell: Cell) -> str:
    """What was measured of a pair, in parentheses; empty where nothing was."""
    if cell.measured is None:
        return ""
    more = cell.measured.kl / cell.measured.bound - 1
    return gettext(
        " (KL {loss}, {change} against {bound})",
        loss=significant(cell.measured.kl),
        change=format(more, "+.0%"),
        bound=significant(cell.measured.bound),
    )


def matrix(found: Matrix) -> RenderableType:
    """A grid of signs, rows the first part and columns the second; then every reason not to, once."""
    grid = plain_table(("", *(str(number) for number in range(1, len(found.parts) + 1))))
    for number, first in enumerate(found.parts, start=1):
        cells = [Text("") if first == second else _sign(found, first, second) for second in found.parts]
        grid.add_row(Text(f"{number:>2} {first}"), *cells)
    legend = Text(gettext("rows first, columns second: "))
    for label, sign in SIGNS.items():
        legend.append(f" {sign} ", style=f"bold {STYLES[label]}").append(gettext(label))
    return Group(grid, legend, *_reasons(found, "degrades"), *_reasons(found, "refuses"), *_protocol(found))


def _sign(found: Matrix, first: Part, second: Part) -> Text:
    label = found.cell(first, second).answer.label
    return Text(SIGNS[label], style=STYLES[label])


def _reasons(found: Matrix, label: Label) -> list[RenderableType]:
    """The reasons for one label, each with the pairs that it is the reason for."""
    by_reason: dict[str, list[Cell]] = {}
    for cell in found.cells:
        if cell.answer.label == label:
            by_reason.setdefault(cell.answer.reason, []).append(cell)
    if not by_reason:
        return []
    table = plain_table((gettext(label), gettext("why")))
    for reason, cells in by_reason.items():
        for cell in [cell for cell in cells if not _told_before(cell, cells)]:
            add(table, gettext(", ").join((str(cell.first), str(cell.second))), reason + loss(cell))
    return [Text(), table]


def _told_before(cell: Cell, cells: list[Cell]) -> bool:
    """Whether the same two, the other way round, stand in ``cells`` before."""
    return any((other.second, other.first) == (cell.first, cell.second) for other in cells[: cells.index(cell)])


def _protocol(found: Matrix) -> list[RenderableType]:
    on = found.measured_on
    if not on:
        return []
    where = {"model": on["model"], "processor": on["cpu"], "date": on["date"]}
    return [Text(gettext("measured on {model}, {processor}, {date}: docs/stacking.md", **where), style="dim")]
