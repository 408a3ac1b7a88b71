"""``quern train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb, working
from quern.cli.terminal.streams import kept_pipes


@verb("quern train models/python-7m -o trained --recipe compact --train scales", resumes=True)
def train(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Quantize by this recipe first (see quern recipes).", show_default=False),
    ] = None,
    artifact: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", help="Or begin with this artifact of MODEL.", show_default=False),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text or records (JSON, CSV, Parquet) to train on; one or several.",
            exists=True,
            dir_okay=False,
            callback=kept_pipes,
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        Literal["scales", "codes"],
        typer.Option(help="scales: no code moves, and no weights are kept in full precision; codes: everything."),
    ] = "codes",
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of text; one eighth is held out and says whether training helps.")
    ] = 65536,
    passes: Annotated[int, typer.Option(min=1, help="How often the text is gone through.")] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Relative change of a scale in a step.", show_default="0.001; 0.0005 for scales"
        ),
    ] = None,
    memory: options.Memory = None,
    seed: options.Seed = 0,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    on_unhealthy: options.OnUnhealthy = "stop",
    stream: options.Stream = False,
    json: options.Json = False,
) -> None:
    """Train what a recipe makes of MODEL, at the same bytes, towards MODEL's own predictions.

    The same command continues after an interruption.
    """
    limit = options.optional_size(memory, "--memory")
    from quern.cli.views.training import train_report
    from quern.pipeline.train import train as api

    with working() as progress:
        report = api(
            model,
            output,
            recipe=recipe,
            artifact=artifact,
            texts=texts or (),
            train=train,
            tokens=tokens,
            passes=passes,
            learning_rate=learning_rate,
            memory=limit,
            seed=seed,
            fresh=fresh,
            threads=threads,
            on_unhealthy=on_unhealthy,
            stream=stream,
            progress=progress,
        )
    show(report, json, train_report)
