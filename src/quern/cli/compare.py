"""``quern compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import say, show, verb, working
from quern.core.errors import UserError
from quern.core.text.language import gettext

RECIPES = "compact,fast,balanced,rtn4"

Peers = Annotated[
    str,
    typer.Option(
        metavar="P1,P2,...",
        help="Other tools to run beside quern: a name such as hqq, one variant as hqq:int4-g64, or all. "
        "[dim]quern peers list[/dim] shows them.",
        show_default="none",
    ),
]

Caches = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="D1,D2,...",
        help="Keys and values: float16, int8, int4, float32. A row of every recipe with each.",
        show_default="float16",
    ),
]

Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="A quarter of the tokens and one short timed round: sooner, with wider intervals or none."
    ),
]


@verb("quern compare models/python-7m --recipes compact,balanced -o comparison", resumes=True, writes_page=True)
def compare(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for results.json and report.html.", show_default=False
        ),
    ],
    recipes: Annotated[
        str,
        typer.Option(
            "--recipes", "--recipe", metavar="R1,R2,...", help="Shipped recipes or recipe files, separated by commas."
        ),
    ] = RECIPES,
    peers: Peers = "",
    quick: Quick = False,
    no_speed: options.NoSpeed = False,
    peer_time_limit: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=1, help="What another tool may take to make one artifact, and again to be measured."
        ),
    ] = 3600.0,
    calibration: options.Calibration = None,
    calibration_tokens: options.CalibrationTokens = None,
    calibration_time: options.CalibrationTime = None,
    text: options.Texts = None,
    choice: options.Choices = None,
    tokens: options.Tokens = 4096,
    scenario: options.ScenarioName = "overall",
    memory: options.Memory = None,
    threads: options.Threads = None,
    ray: options.Ray = None,
    engine: options.EngineName = "auto",
    cache: Caches = None,
    seed: options.Seed = 0,
    fresh: options.Fresh = False,
    json: options.Json = False,
) -> None:
    """Quantize MODEL by several recipes and other tools, measure all of them beside the original, and recommend one.

    Run again after an interruption: what was quantized and measured is kept. Without --text and --calibration, text
    that the running Python carries is used.
    """
    names, tools = _rows(recipes, peers)
    limit = options.optional_size(memory, "--memory")
    from quern.cli.views import results as render
    from quern.comparison.inputs import MeasurementSettings
    from quern.pipeline.compare import compare as api

    with working() as progress, options.shared_over(ray):
        results = api(
            model,
            output,
            recipes=names,
            peers=tools,
            quick=quick,
            speed_rounds=0 if no_speed else MeasurementSettings.speed_rounds,
            peer_time_limit=peer_time_limit,
            calibration=calibration or (),
            calibration_tokens=options.calibration_tokens(calibration_tokens),
            calibration_time=options.optional_seconds(calibration_time, "--calibration-time"),
            texts=text or (),
            choices=choice or (),
            tokens=tokens,
            memory=limit,
            threads=threads,
            engine=engine,
            caches=options.names(cache) or (),
            seed=seed,
            fresh=fresh,
            scenario=scenario,
            progress=progress,
        )
    show(results, json, render.results)
    paths = {"results": output / "results.json", "report": output / "report.html"}
    say(gettext("wrote {results} and {report}", **paths), stderr=True)


def _rows(recipes: str, peers: str) -> tuple[list[str], list[str]]:
    """Recipes and tools, at least one of them. Raises ``UserError``."""
    names, tools = _names(recipes), _names(peers)
    if not names and not tools:
        told = {"given": recipes, "known": RECIPES}
        raise UserError(
            gettext("--recipes {given!r} names no recipe; give names separated by commas, such as {known}", **told)
        )
    return names, tools


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
