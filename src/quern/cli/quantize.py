"""``quern quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from quern.cli import options
from quern.cli.outcome import show, verb, working


@verb("quern quantize models/python-7m -o quantized --recipe compact", resumes=True)
def quantize(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False)],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "--profile",
            metavar="RECIPE",
            help="A recipe that ships with quern (see quern recipes) or a file.",
        ),
    ] = "balanced",
    calibration: options.Calibration = None,
    memory: options.Memory = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")] = "cpu",
    seed: options.Seed = 0,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    format: Annotated[
        str | None,
        typer.Option(metavar="F", help="Format to write (see quern recipes).", show_default="the recipe's"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Quantize MODEL into the folder OUT. The same command continues after an interruption."""
    from quern.core.recipe import load_recipe

    limit, chosen = options.optional_size(memory, "--memory"), load_recipe(recipe)
    from quern.cli import render
    from quern.pipeline.quantize import quantize as api

    with working() as progress:
        report = api(
            model,
            output,
            recipe=chosen,
            calibration=calibration or (),
            memory=limit,
            device=device,
            seed=seed,
            fresh=fresh,
            threads=threads,
            format=format,
            progress=progress,
        )
    show(report, json, render.quantize_report)
