"""Puts the table of the measures between its markers in docs/results.md, from what each measure declares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quern.core.errors import QuernError, UserError
from quern.evaluation.measures.base import Measure, all_measures

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/results.md"
BEGIN, END = "<!-- measures:begin -->", "<!-- measures:end -->"


def table() -> str:
    """The markdown between the markers."""
    lines = ["| measure | unit | better | in a row | what it is |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, all_measures())])


def _line(measure: Measure) -> str:
    fields = [name for name in (measure.field, measure.interval_field) if name]
    where = [f"`{name}`" for name in fields] or [f"`figures.{measure.name}`"]
    cells = (f"`{measure.name}`", measure.unit or "none", measure.better, ", ".join(where), f"{measure.help}.")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def page(text: str) -> str:
    """``text`` with the table of today. Raises ``UserError`` unless each marker occurs once, in order."""
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in old + after or END in before + after:
        raise UserError(f"{PAGE}: the markers {BEGIN} and {END} must occur once each, in this order; put them back")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Update the page below ``root``."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    try:
        text = page((root / PAGE).read_text("utf-8"))
    except QuernError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    (root / PAGE).write_text(text, "utf-8")
    print(f"updated {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
