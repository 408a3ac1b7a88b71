"""``quern recommend``."""

from __future__ import annotations

from typing import Annotated

import typer

from quern.cli import options
from quern.cli.outcome import show, verb


@verb("quern recommend demo/results.json --scenario storage --max-loss 0.05")
def recommend(
    results: options.ResultsPath,
    scenario: options.ScenarioName,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest model on disk, such as 24GiB.", show_default="any")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(metavar="KL", min=0, help="Largest mean KL divergence to the original.", show_default="any"),
    ] = None,
    min_speed: Annotated[
        float | None,
        typer.Option(metavar="TOKENS/S", min=0, help="Least decoding speed in tokens/s.", show_default="any"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Rank what RESULTS.json measured for a scenario, with the reason for each place and each exclusion.

    Exit code 1 when nothing meets the constraints.
    """
    limit = options.optional_size(max_size, "--max-size")
    from quern.advisor.recommend import recommend as api
    from quern.cli import render
    from quern.core.results import load_results

    answer = api(load_results(results), scenario, max_size=limit, max_loss=max_loss, min_speed=min_speed)
    show(answer, json, render.recommendation)
    if answer.choice is None:
        raise typer.Exit(1)
