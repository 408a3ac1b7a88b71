"""``quern forecast``."""

from __future__ import annotations

from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb, working

On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="HARDWARE",
        help="A shipped hardware file by its name, or the path of one: a machine that need not be here.",
        show_default="this machine, where short runs are made",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="TOKENS", help="Text whose keys and values count to memory.", show_default="4096, or the model's"
    ),
]


@verb("quern forecast models/python-7m --recipe compact --on desktop-16-core")
def forecast(
    model: options.Model,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", metavar="RECIPE", help="A shipped recipe or a file; several.", show_default="balanced"
        ),
    ] = None,
    on: On = None,
    context: Context = None,
    format: Annotated[
        str | None,
        typer.Option(metavar="F", help="Format of the artifact (see quern recipes).", show_default="the recipe's"),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens", min=1, metavar="N", help="Tokens to calibrate on.", show_default="the recipe's"
        ),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Say beforehand what recipes make of MODEL: size, memory, disk, time, speed, context; each figure with its derivation.

    No weight is read: a folder with a config.json is enough. For this machine the real code is run for a short time on
    random weights; for another one its hardware file is read.
    """
    from quern.cli.views.forecast import forecast_view
    from quern.pipeline.forecasting.forecast import forecast as api

    with working() as progress:
        found = api(
            model,
            recipes=recipe or ["balanced"],
            on=on,
            context=context,
            format=format,
            calibration_tokens=calibration_tokens,
            threads=threads,
            progress=progress,
        )
    show(found, json, forecast_view)
