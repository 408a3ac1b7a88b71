"""``quern report``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from quern.cli import options
from quern.cli.terminal.outcome import show, verb
from quern.core.text.language import gettext


@verb("quern report demo/results.json -o report.html", writes_page=True)
def report(
    results: options.ResultsPath,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE.html", help="File to write.", show_default=False)
    ],
    json: options.Json = False,
) -> None:
    """Write RESULTS.json as one HTML page that needs nothing else."""
    from quern.report.html import write_report

    show(
        {"report": write_report(results, output)},
        json,
        lambda written: Text(gettext("wrote {path}", path=written["report"])),
    )
