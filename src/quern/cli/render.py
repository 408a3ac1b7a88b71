"""What a person sees of each result: Rich tables and sentences. No number is computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from quern.advisor.figures import bytes_text, percent_text, seconds_text
from quern.core.results import Recommendation, Results, Row

if TYPE_CHECKING:
    from quern.pipeline.inspect import Inspection
    from quern.pipeline.quantize import QuantizeReport

NOT_MEASURED = "-"
WORST_LINEARS = 5

WIDE = 120
"""Characters that a terminal needs for all columns of the comparison; narrower ones do without interval and memory."""


@dataclass(frozen=True)
class Column:
    """One column of the comparison."""

    heading: str
    """Broken at spaces on a terminal."""
    cell: Callable[[Row], str]
    wide_only: bool = False


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
    return NOT_MEASURED if limits is None else f"{limits[0]:{form}} to {limits[1]:{form}}"


COLUMNS = (
    Column("name", lambda row: row.name),
    Column("size", lambda row: size(row.bytes)),
    Column("smaller by", lambda row: percent(row.compression)),
    Column("bits/ weight", lambda row: number(row.bits_per_weight, ".2f")),
    Column("KL diver- gence", lambda row: number(row.kl_mean, ".4f")),
    Column("95 % interval", lambda row: interval(row.kl_ci95, ".4f"), wide_only=True),
    Column("per- plexity", lambda row: number(row.perplexity, ".2f")),
    Column("top-1", lambda row: percent(row.top1_agreement)),
    Column("choice", lambda row: percent(row.choice_accuracy)),
    Column("prefill tok/s", lambda row: number(row.prefill_tokens_per_s, ".0f")),
    Column("decode tok/s", lambda row: number(row.decode_tokens_per_s, ".1f")),
    Column("peak RAM", lambda row: size(row.peak_rss_bytes), wide_only=True),
)


def heading(column: Column) -> str:
    """The heading on one line."""
    return column.heading.replace("- ", "").replace("/ ", "/")


class _Comparison:
    """The rows as a table of as many columns as the terminal is wide enough for."""

    def __init__(self, rows: Sequence[Row], choice: str | None) -> None:
        self._rows, self._choice = rows, choice

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [column for column in COLUMNS if not column.wide_only or options.max_width >= WIDE]
        headings = [column.heading.replace(" ", "\n") for column in columns]
        table = _table(headings, right=range(1, len(columns)), gap=2 if options.max_width >= WIDE else 1)
        for row in self._rows:
            chosen = row.name == self._choice
            _add(table, *(column.cell(row) for column in columns), style="bold green" if chosen else None)
        yield table


def results(found: Results) -> RenderableType:
    """The comparison's table and its recommendation."""
    table = _Comparison(found.rows, found.recommendation.choice)
    noise = {item.kl_noise_floor for item in found.rows if item.kl_noise_floor is not None}
    floor = [Text(f"KL noise floor: {max(noise):.2g} nats a token", style="dim")] if noise else []
    return Group(table, *floor, Text(), recommendation(found.recommendation))


def recommendation(answer: Recommendation) -> RenderableType:
    """What to use and why, what else, and what not and why not."""
    if answer.choice is None:
        lines = [Text(f"Nothing measured meets the constraints ({answer.scenario}).", style="bold red")]
    else:
        lines = [Text(f"Recommended for {answer.scenario}: {answer.choice}", style="bold green")]
    lines += [Text(f"  {reason}") for reason in answer.reasons]
    lines += [Text(f"{place}. {item.name}: {item.reason}") for place, item in enumerate(answer.ranking, start=1)]
    lines += [Text(f"Excluded: {item.name}: {item.reason}", style="dim") for item in answer.excluded]
    return Group(*lines)


def row(found: Row) -> RenderableType:
    """One contender, one figure a line."""
    table = _table(("figure", "value"))
    for column in COLUMNS:
        _add(table, heading(column), column.cell(found))
    _add(table, "KL noise floor", number(found.kl_noise_floor, ".2g"))
    _add(table, "choice, minus the reference's", number(found.choice_difference, "+.3f"))
    _add(table, "its 95 % interval", interval(found.choice_difference_ci95, "+.3f"))
    _add(table, "decode, share of the machine's limit", percent(found.decode_limit_fraction))
    _add(table, "prefill, share of the machine's limit", percent(found.prefill_limit_fraction))
    _add(table, "time to first token", duration(found.time_to_first_token_s))
    _add(table, "energy, J/token", number(found.energy_joules_per_token))
    return Group(table, *_notes(found.notes))


def quantize_report(report: QuantizeReport) -> RenderableType:
    """What was written, how small it is, and where rounding cost most."""
    facts = _table(("figure", "value"))
    _add(facts, "written to", str(report.path))
    _add(facts, "recipe", f"{report.recipe.name}, format {report.recipe.format}")
    _add(facts, "size", size(report.bytes))
    _add(facts, "smaller by", percent(report.compression))
    _add(facts, "bits/weight", number(report.bits_per_weight, ".2f"))
    _add(facts, "time", duration(report.seconds) + (" (resumed)" if report.resumed and report.seconds else ""))
    _add(facts, "peak RAM", size(report.peak_rss_bytes))
    worst = sorted(report.layers, key=lambda layer: layer.relative_error, reverse=True)[:WORST_LINEARS]
    linears = _table(("costliest linears", "bits/weight", "relative error"), right=(1, 2))
    for layer in worst:
        _add(linears, layer.linear, f"{layer.bits_per_weight:.2f}", f"{layer.relative_error:.2e}")
    hint = Text(f'Try it: quern generate {report.path} --prompt "..."', style="dim")
    return Group(facts, *([linears] if worst else []), *_notes(report.notes), hint)


def inspection(found: Inspection) -> RenderableType:
    """Every tensor and the totals."""
    table = _table(("tensor", "shape", "codec", "granularity", "bits", "bytes"), right=(4, 5))
    for item in found.tensors:
        shape = " x ".join(map(str, item.shape))
        _add(table, item.name, shape, item.codec, item.granularity, f"{item.bits:g}", f"{item.bytes:,}")
    total = (
        f"{len(found.tensors)} tensors, {found.parameters:,} parameters, {found.bits_per_weight:.2f} bits/weight, "
        f"{size(found.bytes)} on disk"
    )
    recipe = f", recipe {found.recipe}" if found.recipe else ""
    return Group(table, Text(total + recipe, style="bold"))


def hardware(found: dict[str, Any]) -> RenderableType:
    """What the machine is and what it was measured to do."""
    table = _table(("what", "value"))
    for key, value in found.items():
        if key != "measured":
            _add(table, key.replace("_", " "), _words(key, value))
    for key, value in (found["measured"] or {}).items():
        if key == "gemm_gop_s":
            for dtype, rates in value.items():
                _add(table, f"matrix products in {dtype}, Gop/s", _by_threads(rates))
        elif key == "read_bandwidth_gb_s":
            _add(table, "reading memory, GB/s", _by_threads(value))
        else:
            _add(table, key.replace("_", " "), _words(key, value))
    return table


def _by_threads(rates: dict[str, float] | None) -> str:
    if not rates:
        return "not measured"
    return ", ".join(f"{rate:g} ({count} thread{'s' * (count != '1')})" for count, rate in rates.items())


def _words(key: str, value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none" if isinstance(value, list) else "not measured"
    if key.endswith("bytes") and isinstance(value, int):
        return size(value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_words(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_words(key, item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def catalogue(found: dict[str, Any]) -> RenderableType:
    """The shipped recipes and the names that a recipe may use."""
    recipes = _table(("recipe", "what it does"))
    for name, description in found["recipes"].items():
        _add(recipes, name, description)
    choices = _table(("choice", "known names"))
    for choice, names in found["choices"].items():
        _add(choices, choice, ", ".join(names))
    return Group(recipes, choices)


def _add(table: Table, *texts: str, style: str | None = None) -> None:
    """A row of plain texts; strings as such would be read as markup."""
    table.add_row(*map(Text, texts), style=style)


def _table(headings: Sequence[str], right: Iterable[int] = (), gap: int = 2) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False)
    to_the_right = set(right)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in to_the_right else "left", overflow="fold")
    return table


def _notes(notes: Iterable[str]) -> list[Text]:
    return [Text(f"note: {note}", style="yellow") for note in notes]
