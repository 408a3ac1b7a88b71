"""``quern evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from quern.cli import options
from quern.cli.outcome import show, verb, working


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
    no_speed: options.NoSpeed = False,
    threads: options.Threads = None,
    engine: options.EngineName = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Measure size, accuracy loss and speed of MODEL.

    Without --text, held-out text that the running Python carries is scored.
    """
    from quern.cli import render
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
            seed=seed,
            progress=progress,
        )
    show(row, json, render.row)
