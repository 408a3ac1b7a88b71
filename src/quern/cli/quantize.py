"""``quern quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from quern.cli import options, targets
from quern.cli.terminal.outcome import show, verb, working


@verb("quern quantize models/python-7m -o quantized --recipe compact", resumes=True)
def quantize(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Folder to write; of format gguf the file.", show_default=False
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "--profile",
            metavar="RECIPE",
            help="A recipe that ships with quern (see quern recipes) or a file; @medium or @high behind it: for less loss.",
            show_default="balanced; auto for a target",
        ),
    ] = None,
    bits: targets.Bits = None,
    fit: targets.Fit = None,
    context: targets.Context = None,
    max_loss: targets.MaxLoss = None,
    min_speed: targets.MinSpeed = None,
    calibration: options.Calibration = None,
    calibration_tokens: options.CalibrationTokens = None,
    calibration_time: options.CalibrationTime = None,
    memory: options.Memory = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")] = "cpu",
    seed: options.Seed = 0,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    on_unhealthy: options.OnUnhealthy = "stop",
    ray: options.Ray = None,
    format: Annotated[
        str | None,
        typer.Option(metavar="F", help="Format to write (see quern recipes).", show_default="the recipe's"),
    ] = None,
    format_option: options.FormatOption = None,
    cache: targets.Cache = None,
    stream: options.Stream = False,
    json: options.Json = False,
) -> None:
    """Quantize MODEL into OUT. The same command continues after an interruption.

    With a target (--bits, --fit, --max-loss, --min-speed) the bits of each linear are planned first, as quern plan does.
    """
    limit = options.optional_size(memory, "--memory")
    chosen = targets.recipe_for(recipe, targets.target_of(bits, fit, context, max_loss, min_speed), "balanced")
    from quern.cli.views import results as render
    from quern.pipeline.quantize import quantize as api

    with working() as progress, options.shared_over(ray, device):
        report = api(
            model,
            output,
            recipe=chosen,
            calibration=calibration or (),
            calibration_tokens=options.calibration_tokens(calibration_tokens),
            calibration_time=options.optional_seconds(calibration_time, "--calibration-time"),
            memory=limit,
            device=device,
            seed=seed,
            fresh=fresh,
            threads=threads,
            on_unhealthy=on_unhealthy,
            format=format,
            format_options=options.pairs(format_option, "--format-option"),
            cache=cache,
            stream=stream,
            progress=progress,
        )
    show(report, json, render.quantize_report)
