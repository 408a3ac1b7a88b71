"""``quern report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from quern.cli import options
from quern.cli.outcome import show, verb


@verb("quern report demo/results.json -o report.html")
def report(
    results: options.ResultsPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.html", help="File to write.", show_default=False)
    ],
    json: options.Json = False,
) -> None:
    """Write RESULTS.json as one HTML page that needs nothing else."""
    from quern.report.html import write_report

    write_report(results, output)
    show({"report": output.absolute()}, json, lambda written: Text(f"wrote {written['report']}"))
