"""``quern quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from quern.cli import options
from quern.cli.outcome import show, verb, working
from quern.core.errors import UserError

DEFAULT_PROFILE = "balanced"


@verb("quern quantize models/python-7m -o quantized --profile compact", resumes=True)
def quantize(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write.", show_default=False)],
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="A recipe that ships with quern (see quern recipes).", show_default=DEFAULT_PROFILE
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own recipe, YAML or JSON, instead of a profile.", show_default=False),
    ] = None,
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
    if profile is not None and recipe is not None:
        raise UserError(f"--profile {profile} and --recipe {recipe} are both given; give one of them")
    chosen = _existing(recipe) if recipe is not None else _shipped(profile or DEFAULT_PROFILE)
    limit = options.optional_size(memory, "--memory")
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


def _existing(recipe: Path) -> Path:
    if not recipe.is_file():
        raise UserError(f"--recipe {recipe}: there is no such file; a shipped recipe is named with --profile")
    return recipe.absolute()


def _shipped(profile: str) -> str:
    from quern.core.recipe import profile_names

    if profile not in profile_names():
        known = ", ".join(profile_names())
        raise UserError(f"--profile {profile!r} does not exist; there are {known}. Your own file goes with --recipe")
    return profile
