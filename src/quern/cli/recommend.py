"""``quern recommend``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb
from quern.core.errors import UserError
from quern.core.results import Recommendation, Scenario, Target
from quern.core.text.language import gettext, pgettext

if TYPE_CHECKING:
    from rich.console import RenderableType

CEILING = "what an unquantized model of its size would lose"

Loss = Annotated[
    float | None,
    typer.Option(metavar="KL", min=0, help="Largest mean KL divergence to the original.", show_default=CEILING),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="size=1,speed=2,loss=1",
        help="For --scenario mix: what a halving of size, a doubling of speed and a halving's worth of loss count.",
        show_default=False,
    ),
]
Results = Annotated[
    Path | None, typer.Argument(metavar="RESULTS.json", help="What `quern compare` wrote.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="In place of RESULTS.json: say which hardware runs this model, with which recipe and runtime.",
        show_default=False,
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="Hardware files for --model, by name or path.", show_default="all that ship"),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Count the key/value cache of a text of so many tokens to --max-memory, or with --model to memory.",
        show_default="as timed; with --model 4096",
    ),
]


@verb("quern recommend demo/results.json --scenario storage --max-loss 0.05")
def recommend(
    results: Results = None,
    scenario: Annotated[
        Scenario,
        typer.Option(
            parser=options.scenario_named, metavar="NAME", help=f"{options.SCENARIOS}; mix: as --weights says."
        ),
    ] = "overall",
    weights: Weights = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest model on disk, such as 24GiB.", show_default="any")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest peak resident memory while it runs.", show_default="any"),
    ] = None,
    context: Context = None,
    max_loss: Loss = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", min=0, max=1, help="Least top-1 agreement, such as 0.95.", show_default="any"),
    ] = None,
    min_speed: Annotated[
        float | None,
        typer.Option(metavar="TOKENS/S", help="Least decoding speed in tokens/s, above 0.", show_default="any"),
    ] = None,
    target: Annotated[
        Target | None,
        typer.Option(
            "--for",
            parser=options.target_named,
            metavar="NAME",
            help=f"The runtime that has to load it: {', '.join(get_args(Target))}.",
            show_default="any",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(metavar="SPDX,...", help="Licences that the tool may have: MIT,Apache-2.0.", show_default="any"),
    ] = None,
    model: Model = None,
    hardware: Hardware = None,
    json: options.Json = False,
) -> None:
    """Rank what RESULTS.json measured for a scenario, with the reason for each place and each exclusion.

    The machine that the figures come from is named, with a warning where it is not like this one. With --model nothing was
    measured: recipes and runtimes on the hardware named are ranked by what is predicted of them. Exit code 1 when
    nothing meets the constraints.
    """
    size, memory = options.optional_size(max_size, "--max-size"), options.optional_size(max_memory, "--max-memory")
    mix, licences = options.parse_weights(weights), options.names(licence)
    if model is not None:
        others = {"--max-memory": max_memory, "--max-loss": max_loss, "--min-agreement": min_agreement}
        _refuse("--model", {"RESULTS.json": results, **others, "--licence": licence})
        limits = {"context": context, "min_speed": min_speed, "max_size": size, "target": target}
        _placements(model, options.names(hardware), json, scenario=scenario, weights=mix, **limits)
        return
    if results is None:
        raise UserError(
            gettext("give RESULTS.json, which quern compare wrote, or --model MODEL for what was not measured")
        )
    _refuse("RESULTS.json", {"--hardware": hardware})
    from quern.advisor.hardware import this_processor
    from quern.advisor.machine import warnings_here
    from quern.advisor.recommend import recommend as api
    from quern.core.results import load_results

    answer = api(
        load_results(results), scenario, weights=mix, max_size=size, max_memory=memory, context=context,
        max_loss=max_loss, min_agreement=min_agreement, min_speed=min_speed, target=target, licences=licences,
    )  # fmt: skip
    assert answer.measured_on is not None
    answer.warnings = warnings_here(answer.measured_on, this_processor())
    show(answer, json, _with_machine)
    if answer.choice is None:
        raise typer.Exit(1)


def _refuse(given: str, others: dict[str, object]) -> None:
    """Raise ``UserError`` where options were given that do not go with ``given``."""
    if found := [name for name, value in others.items() if value is not None]:
        both = pgettext("between options", " and ").join(found)
        raise UserError(
            gettext("{options} cannot be given with {given}. Leave out one of the two", options=both, given=given)
        )


def _placements(model: str, hardware: tuple[str, ...] | None, json: bool, **given: Any) -> None:
    """Rank where a model could run."""
    from quern.cli.views.forecast import placements_view
    from quern.pipeline.forecasting.placement import place

    found = place(model, hardware=hardware or (), **given)
    show(found, json, placements_view)
    if found.choice is None:
        raise typer.Exit(1)


def _with_machine(answer: Recommendation) -> RenderableType:
    """The recommendation below the machine that it rests on."""
    from rich.console import Group
    from rich.text import Text

    from quern.advisor.machine import measured_on_text
    from quern.cli.views import results as render

    machine = [Text(measured_on_text(answer.measured_on))] if answer.measured_on is not None else []
    warnings = [Text(gettext("warning: {warning}", warning=warning), style="yellow") for warning in answer.warnings]
    return Group(*machine, *warnings, render.recommendation(answer))
