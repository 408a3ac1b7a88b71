"""``quern export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb, working


@verb("quern export quantized -o model.gguf", resumes=True)
def export(
    artifact: options.ArtifactPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="File or folder to write.", show_default=False)
    ],
    format: Annotated[
        str, typer.Option(metavar="F", help="Format to write (see quern recipes), or run, for quern-run.")
    ] = "gguf",
    format_option: options.FormatOption = None,
    keep_padding: Annotated[
        bool, typer.Option("--keep-padding", help="Keep the zeros that the recipe's padding added.")
    ] = False,
    fresh: options.Fresh = False,
    json: options.Json = False,
) -> None:
    """Write the artifact PATH in another format, every stored value as it is; for llama.cpp where nothing else is said."""
    from quern.cli.views.exports import export_report
    from quern.pipeline.export import export as api

    with working() as progress:
        report = api(
            artifact,
            output,
            format=format,
            format_options=options.pairs(format_option, "--format-option"),
            keep_padding=keep_padding,
            fresh=fresh,
            progress=progress,
        )
    show(report, json, export_report)
