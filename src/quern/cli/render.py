"""What a person sees of each result: Rich tables and sentences. No number is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quern.core.results import Recommendation, Results, Row

if TYPE_CHECKING:
    from quern.pipeline.inspect import Inspection
    from quern.pipeline.quantize import QuantizeReport

NOT_MEASURED = "-"
WORST_LINEARS = 5

HEADINGS = (
    "name",
    "size",
    "smaller by",
    "bits/weight",
    "KL divergence [95 %]",
    "perplexity",
    "top-1",
    "choice",
    "prefill tok/s",
    "decode tok/s",
    "peak RAM",
)
"""Columns of ``cells``."""


def size(count: float | None) -> str:
    """Bytes in the binary unit that suits them."""
    if count is None:
        return NOT_MEASURED
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or the sign for what was not measured."""
    return NOT_MEASURED if value is None else format(value, form)


def cells(row: Row) -> list[str]:
    """One row of the comparison, a text for each of ``HEADINGS``."""
    loss = number(row.kl_mean, ".4f")
    if row.kl_ci95 is not None:
        loss += f" [{row.kl_ci95[0]:.4f}, {row.kl_ci95[1]:.4f}]"
    return [
        row.name,
        size(row.bytes),
        number(row.compression, ".1%"),
        number(row.bits_per_weight, ".2f"),
        loss,
        number(row.perplexity, ".2f"),
        number(row.top1_agreement, ".1%"),
        number(row.choice_accuracy, ".1%"),
        number(row.prefill_tokens_per_s, ".0f"),
        number(row.decode_tokens_per_s, ".1f"),
        size(row.peak_rss_bytes),
    ]


def results(found: Results) -> RenderableType:
    """The comparison's table and its recommendation."""
    table = _table(HEADINGS, right=range(1, len(HEADINGS)))
    for item in found.rows:
        chosen = item.name == found.recommendation.choice
        _add(table, *cells(item), style="bold green" if chosen else None)
    noise = {item.kl_noise_floor for item in found.rows if item.kl_noise_floor is not None}
    floor = Text(f"KL noise floor: {max(noise):.2g}", style="dim") if noise else Text()
    return Group(table, floor, Text(), recommendation(found.recommendation))


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
    for heading, cell in zip(HEADINGS, cells(found), strict=True):
        _add(table, heading, cell)
    _add(table, "KL noise floor", number(found.kl_noise_floor, ".2g"))
    _add(table, "choice, minus the reference's", _difference(found))
    _add(table, "decode, share of the machine's limit", number(found.decode_limit_fraction, ".0%"))
    _add(table, "prefill, share of the machine's limit", number(found.prefill_limit_fraction, ".0%"))
    _add(table, "time to first token, s", number(found.time_to_first_token_s))
    _add(table, "energy, J/token", number(found.energy_joules_per_token))
    return Group(table, *_notes(found.notes))


def _difference(found: Row) -> str:
    text = number(found.choice_difference, "+.1%")
    if found.choice_difference_ci95 is not None:
        text += f" [{found.choice_difference_ci95[0]:+.1%}, {found.choice_difference_ci95[1]:+.1%}]"
    return text


def quantize_report(report: QuantizeReport) -> RenderableType:
    """What was written, how small it is, and where rounding cost most."""
    facts = _table(("figure", "value"))
    _add(facts, "written to", str(report.path))
    _add(facts, "recipe", f"{report.recipe.name}, format {report.recipe.format}")
    _add(facts, "size", size(report.bytes))
    _add(facts, "smaller by", number(report.compression, ".1%"))
    _add(facts, "bits/weight", number(report.bits_per_weight, ".2f"))
    _add(facts, "time", f"{report.seconds:.1f} s" + (" (resumed)" if report.resumed else ""))
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


def _table(headings: Sequence[str], right: Iterable[int] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    to_the_right = set(right)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in to_the_right else "left", overflow="fold")
    return table


def _notes(notes: Iterable[str]) -> list[Text]:
    return [Text(f"note: {note}", style="yellow") for note in notes]
