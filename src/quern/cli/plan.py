"""``quern plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from quern.cli import options, targets
from quern.cli.terminal.outcome import show, verb, working


@verb("quern plan models/python-7m --bits 3.0 -o plan.yaml", resumes=True)
def plan(
    model: options.Model,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PLAN.yaml", help="Recipe to write.", show_default="none is written"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="RECIPE", help="A recipe with an allocation.", show_default="auto"),
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
    seed: options.Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute the losses of candidates anew.")] = False,
    threads: options.Threads = None,
    ray: options.Ray = None,
    format: Annotated[
        str | None,
        typer.Option(metavar="F", help="Format to plan for (see quern recipes).", show_default="the recipe's"),
    ] = None,
    format_option: options.FormatOption = None,
    cache: targets.Cache = None,
    stream: options.Stream = False,
    json: options.Json = False,
) -> None:
    """Choose a scheme for each linear of MODEL that meets a target with the least loss, and write that as a recipe.

    Without a target that of the recipe is taken. Losses of candidates are computed once for a model and a calibration
    text; the same command continues after an interruption.
    """
    limit = options.optional_size(memory, "--memory")
    target = targets.target_of(bits, fit, context, max_loss, min_speed)
    chosen = targets.recipe_for(recipe, target, targets.ALLOCATING)
    from quern.cli.views.plan import plan_report
    from quern.pipeline.planning.plan import plan as api

    with working() as progress, options.shared_over(ray):
        report = api(
            model,
            output,
            recipe=chosen,
            calibration=calibration or (),
            calibration_tokens=options.calibration_tokens(calibration_tokens),
            calibration_time=options.optional_seconds(calibration_time, "--calibration-time"),
            memory=limit,
            seed=seed,
            fresh=fresh,
            threads=threads,
            format=format,
            format_options=options.pairs(format_option, "--format-option"),
            cache=cache,
            stream=stream,
            progress=progress,
        )
    show(report, json, plan_report)
