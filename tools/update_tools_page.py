"""Writes docs/tools.md from results files that `quern compare --peers ...` wrote: tables, places, what failed."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from quern.advisor.deployment import licence_of, maker_of, targets_of
from quern.advisor.placement import placements
from quern.cli.views.columns import interval, number, percent, size
from quern.core.errors import QuernError, UserError
from quern.core.results import Results, Row, load_results
from quern.core.text.units import bytes_text, percent_text, seconds_text, significant
from quern.report.provenance import machine_line, model_line, model_name
from quern.report.wording import STAGES, protocol_text, scale_text, tool_text, under_foreign_load

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs") / "tools.md"
SOURCES = "<!-- Written by tools/update_tools_page.py from: {} -->"
CLASSES: tuple[tuple[str, float], ...] = (
    ("below 3.5", 3.5),
    ("3.5 to 4.5", 4.5),
    ("4.5 to 5.5", 5.5),
    ("5.5 to 7", 7.0),
    ("7 to 9", 9.0),
    ("9 and more", math.inf),
)
"""Ranges of real bits per weight, everything included, in which rows are compared with each other: name, and the end of
the range, which belongs to the next one. What a tool calls its bits leaves out scales, embeddings and what it did not
quantize."""
MEASURES: tuple[tuple[str, str, bool, Callable[[float], str]], ...] = (
    ("size", "bytes", True, bytes_text),
    ("KL", "kl_mean", True, significant),
    ("decode", "decode_tokens_per_s", False, lambda rate: f"{significant(rate)} tokens/s"),
    ("prefill", "prefill_tokens_per_s", False, lambda rate: f"{significant(rate)} tokens/s"),
    ("memory", "peak_rss_bytes", True, bytes_text),
    ("time to make", "quantize_seconds", True, seconds_text),
)
"""What rows are ranked by: name, field, whether less is better, and how the figure is written."""
RANKED = 4
"""The first of them, by which rows of as many bits are compared."""
INTRODUCTION = """# The tools side by side

Every figure on this page was measured by `quern compare`, for all rows of a model under the same settings and by the
rules of [results.md](results.md): sizes are counted from the files with embeddings and scales, losses are against the
same reference on the same tokens, speeds are of each tool's own runtime on the machine that is named. Contenders take
turns in groups that fit in memory together; groups follow one another, and a comparison that was interrupted measures
what was left in a later start. Where the unquantized model, which runs in every group, shows that the machine had changed
its speed meanwhile, the notes of the rows say so. Compare speeds within one table only. A tool that is missing here was
not measured, which says nothing about it.
"""
LEGEND = """\
Rows are in the order of their size. *Bits* are those in which weights lie on disk, everything included; KL is in nats a
token with its 95 % interval; *agreement* is the share of tokens whose likeliest prediction is the unquantized model's;
*prefill* and *decode* are tokens/s at batch 1; *memory* is the peak while it runs; *made in* is the time that quantizing
took, with its peak memory; *measured in* that of loading, timing and scoring. A star marks speeds that other programs
disturbed.
"""


def page(sources: Sequence[tuple[str, Results]]) -> str:
    """The whole page for results files and the names that they go by."""
    parts = [SOURCES.format(" ".join(name for name, _ in sources)), INTRODUCTION, LEGEND]
    return "\n".join([*parts, *(_section(results, source) for source, results in sources)])


def _section(results: Results, source: str) -> str:
    parts = [
        f"## {model_name(results)}\n",
        _facts(results, source),
        _table(results),
        f"Places. {scale_text(results.rows)}\n",
        "### At about so many bits per weight\n",
        _classes(results),
        "### What each tool is good at here\n",
        "\n".join(_profile(tool, results) for tool in _tools(results)),
    ]
    if results.failures:
        parts += ["### What failed and how\n", _failures(results)]
    if any(row.notes for row in results.rows):
        parts += ["### Notes\n", _notes(results)]
    return "\n".join(parts)


def _facts(results: Results, source: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results.versions.items()))
    lines = [
        f"- Model: {model_line(results)}, SHA-256 `{results.model.sha256[:16]}`",
        f"- Machine: {machine_line(results.hardware) or 'not named'}",
        f"- Measured: {results.created[:10]} with quern {results.quern_version}, seed {results.seed}",
        f"- Versions: {versions}",
        f"- Texts: {', '.join(f'{text.name} ({text.tokens:,} tokens)' for text in results.texts) or 'none'}",
    ]
    if results.protocol is not None:
        lines.append(f"- Protocol: {protocol_text(results.protocol, results.rows)}")
    lines.append(f"- Whole results: [{source}](../{source})")
    return "\n".join(map(_plain, lines)) + "\n"


def _table(results: Results) -> str:
    headings = (
        *("name", "tool", "place", "size", "smaller by", "bits", "KL", "95 % interval", "perplexity", "agreement"),
        *("choice", "prefill", "decode", "memory", "made in", "measured in"),
    )
    placed = zip(results.rows, placements(results.rows), strict=True)
    rows = [
        (
            row.name,
            tool_text(row, results.quern_version) or "-",
            place.label,
            *(size(row.bytes), percent(row.compression), number(row.bits_per_weight, ".2f")),
            *(number(row.kl_mean, ".4f"), interval(row.kl_ci95, ".4f"), number(row.perplexity, ".2f")),
            *(percent(row.top1_agreement), percent(row.choice_accuracy)),
            *(_speed(row, row.prefill_tokens_per_s, ".0f"), _speed(row, row.decode_tokens_per_s, ".1f")),
            *(
                size(row.peak_rss_bytes),
                _making(row),
                seconds_text(row.measure_seconds) if row.measure_seconds else "-",
            ),
        )
        for row, place in sorted(placed, key=lambda pair: pair[0].bytes)
    ]
    return _markdown(headings, rows, left=3)


def _speed(row: Row, value: float | None, form: str) -> str:
    return number(value, form) + ("\\*" if value is not None and under_foreign_load(row) else "")


def _making(row: Row) -> str:
    if row.quantize_seconds is None:
        return "-"
    peak = f", {bytes_text(row.quantize_peak_rss_bytes)}" if row.quantize_peak_rss_bytes is not None else ""
    return seconds_text(row.quantize_seconds) + peak


def _of_class(name: str, rows: Sequence[Row]) -> list[Row]:
    """The quantized rows whose real bits per weight lie in the range of that name."""
    ends = [end for _, end in CLASSES]
    place = [known for known, _ in CLASSES].index(name)
    begin = ends[place - 1] if place else 0.0
    return [row for row in rows if row.kind != "unquantized" and begin <= row.bits_per_weight < ends[place]]


def ranked(rows: Sequence[Row], field: str, *, less: bool) -> list[Row]:
    """The rows that have the figure, best first; equal ones in their order."""
    found = [row for row in rows if getattr(row, field) is not None]
    return sorted(found, key=lambda row: getattr(row, field) if less else -getattr(row, field))


def _classes(results: Results) -> str:
    """For each range of real bits per weight, who is best in what."""
    lines = []
    for bits, _ in CLASSES:
        if rows := _of_class(bits, results.rows):
            cells = [
                f"{best[0].name} ({text(getattr(best[0], field))})" if (best := ranked(rows, field, less=less)) else "-"
                for _, field, less, text in MEASURES[:RANKED]
            ]
            lines.append((bits, f"{len(rows)}", *cells))
    return _markdown(
        ("bits per weight", "rows", *(f"best {what}" for what, *_ in MEASURES[:RANKED])), lines, left=2 + RANKED
    )


def _tools(results: Results) -> list[str]:
    makers = (maker[0] for row in results.rows if (maker := maker_of(row, results.quern_version)))
    return list(dict.fromkeys(makers))


def _profile(tool: str, results: Results) -> str:
    """One tool's rows in words: their range, what they are best in, their ranks, and their places."""
    made = [row for row in results.rows if (maker_of(row, results.quern_version) or ("",))[0] == tool]
    targets = dict.fromkeys(target for row in made for target in targets_of(row))
    text = f"**{tool_text(made[0], results.quern_version)}** ({licence_of(made[0])}; loads in {', '.join(targets)}). "
    text += _range(made)
    if best := _bests(made, results):
        text += f" First of all quantized rows in {', '.join(best)}."
    if ranks := _ranks(made, results):
        text += f" Ranks of its best row: {'; '.join(ranks)}."
    places = {row.name: place for row, place in zip(results.rows, placements(results.rows), strict=True)}
    text += " Places: " + "; ".join(f"{row.name} {places[row.name].label}" for row in made) + "."
    return _plain(text) + "\n"


def _range(made: Sequence[Row]) -> str:
    """Sizes, losses and speeds from the least to the greatest."""
    parts = [f"{len(made)} row{'' if len(made) == 1 else 's'}"]
    for label, field, text, unit in (
        ("", "bytes", bytes_text, ""),
        ("KL ", "kl_mean", significant, ""),
        ("agreement ", "top1_agreement", percent_text, ""),
        ("decode ", "decode_tokens_per_s", significant, " tokens/s"),
    ):
        if values := [value for row in made if (value := getattr(row, field)) is not None]:
            low, high = text(min(values)), text(max(values))
            parts.append(f"{label}{low if low == high else f'{low} to {high}'}{unit}")
    return f"{', '.join(parts)}."


def _bests(made: Sequence[Row], results: Results) -> list[str]:
    """What one of ``made`` is first in, of all quantized rows."""
    quantized, found = [row for row in results.rows if row.kind != "unquantized"], []
    for what, field, less, text in MEASURES:
        order = ranked(quantized, field, less=less)
        if order and order[0] in made:
            found.append(f"{what} ({order[0].name}, {text(getattr(order[0], field))})")
    return found


def _ranks(made: Sequence[Row], results: Results) -> list[str]:
    """For each range of real bits per weight, the rank of the best of ``made`` in each measure."""
    found = []
    for bits, _ in CLASSES:
        rows, own = _of_class(bits, results.rows), []
        for what, field, less, _ in MEASURES[:RANKED]:
            order = ranked(rows, field, less=less)
            rank = next((rank for rank, row in enumerate(order, start=1) if row in made), None)
            own += [f"{what} {rank}"] if rank is not None else []
        found += [f"of {len(rows)} at {bits} bits per weight: {', '.join(own)}"] if own else []
    return found


def _failures(results: Results) -> str:
    rows = [(failure.name, failure.tool, STAGES[failure.stage], failure.reason) for failure in results.failures]
    return _markdown(("name", "tool", "while", "reason"), rows, left=4)


def _notes(results: Results) -> str:
    """Every note once, with the rows that it is about."""
    rows: dict[str, list[str]] = {}
    for row in results.rows:
        for note in row.notes:
            rows.setdefault(note, []).append(row.name)
    return "\n".join(_plain(f"- {', '.join(names)}: {note}") for note, names in rows.items()) + "\n"


def _plain(text: str) -> str:
    """Text in which no tool's message can become an element of the page."""
    return re.sub(r"\s+", " ", text.replace("<", "&lt;")).strip()


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A table whose first ``left`` columns are aligned to the left."""
    lines = [[_plain(cell).replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    text.insert(1, "|" + "".join("---|" if place < left else "---:|" for place in range(len(headings))))
    return "\n".join(text) + "\n"


def sources_of(text: str) -> list[str]:
    """The results files that a page was written from. Raises ``UserError``."""
    match = re.match(re.escape(SOURCES).replace(r"\{\}", r"(\S+(?: \S+)*)"), text)
    if match is None:
        raise UserError(f"{PAGE} does not begin with the line that names its results files; write it again")
    return match[1].split(" ")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the page below ``root``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results files inside the repository, in their order")
    try:
        found = []
        for path in parser.parse_args(arguments).results:
            whole = path if path.is_absolute() else root / path
            if not whole.resolve().is_relative_to(root.resolve()) or " " in str(path):
                raise UserError(
                    f"{path}: must lie in the repository under a name without spaces, for the page links to it"
                )
            found.append((whole.resolve().relative_to(root.resolve()).as_posix(), load_results(whole)))
        text = page(found)
    except QuernError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (root / PAGE).parent.mkdir(exist_ok=True)
    (root / PAGE).write_text(text, "utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
