"""``quern status``."""

from __future__ import annotations

from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb


@verb("quern status quantized")
def status(
    path: Annotated[
        str, typer.Argument(metavar="OUT", help="The output of a job, or its work folder.", show_default=False)
    ],
    json: options.Json = False,
) -> None:
    """Say how far the jobs are that write OUT, whether a process works on them, and the time left."""
    from quern.cli.views.status import status as render
    from quern.pipeline.status import status as api

    show(api(path), json, render)
