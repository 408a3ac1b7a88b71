"""``quern evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb, working


@verb("quern evaluate quantized --reference models/python-7m --choice models/python-7m/choice.jsonl")
def evaluate(
    model: options.Model,
    reference: Annotated[
        str | None,
        typer.Option(metavar="REF", help="The unquantized model to compare with.", show_default=False),
    ] = None,
    text: options.Texts = None,
    choice: options.Choices = None,
    tokens: options.Tokens = 4096,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tasks of lm-eval to run as well: hellaswag,arc_easy.", show_default=False),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Further tasks: lm-eval's YAML files.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Items of each task.", show_default="all")
    ] = None,
    no_speed: options.NoSpeed = False,
    threads: options.Threads = None,
    engine: options.EngineName = "auto",
    cache: options.CacheName = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Measure size, accuracy loss and speed of MODEL.

    Without --text, held-out text that the running Python carries is scored. With it, inputs of linears that are not
    like those of calibration are named, for an artifact that was calibrated.
    """
    from quern.cli.views import results as render
    from quern.comparison.inputs import MeasurementSettings
    from quern.pipeline.evaluate import evaluate as api

    with working() as progress:
        row = api(
            model,
            reference=reference,
            texts=text or (),
            choices=choice or (),
            tokens=tokens,
            speed_rounds=0 if no_speed else MeasurementSettings.speed_rounds,
            threads=threads,
            engine=engine,
            cache=cache,
            tasks=options.names(tasks),
            tasks_path=tasks_path,
            limit=limit,
            seed=seed,
            progress=progress,
        )
    show(row, json, render.row)
