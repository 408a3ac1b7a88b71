"""``quern check``."""

from __future__ import annotations

from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb, working
from quern.core.errors import UserError
from quern.core.text.language import gettext


@verb("quern check balanced --for vllm")
def check(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A shipped recipe, a recipe file or an artifact.", show_default=False),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="RUNTIME",
            help="What is to run it: cpu, transformers, vllm or llama.cpp.",
            show_default="any",
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="DTYPE", help="Keys and values: float16, int8 ...", show_default="float16"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Check it for this model.", show_default="an ordinary decoder"),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option("--tensor-parallel", metavar="N", help="On so many GPUs, with --for vllm.", show_default="any"),
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Show every ordered pair of parts; with RECIPE, of its parts.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Say whether the parts of RECIPE can be stacked, and whether a runtime runs what it makes.

    Nothing is quantized. Exit code 1: it is refused, with the reason.
    """
    if recipe is None and not matrix:
        raise UserError(gettext("name a recipe (quern recipes lists them) or a recipe file, or give --matrix"))
    from quern.cli.views import check as render_check

    if matrix:
        if model is not None or tensor_parallel is not None or (recipe is None and (runtime, cache) != (None, None)):
            raise UserError(
                gettext(
                    "--matrix shows pairs of parts; --model and --tensor-parallel are for RECIPE alone, --for and --cache "
                    "go with RECIPE"
                )
            )
        from quern.core.recipe import load_recipe
        from quern.pipeline.stacking.check import refuse_unknown
        from quern.pipeline.stacking.matrix import matrix as api_matrix
        from quern.pipeline.stacking.parts import parts_of

        refuse_unknown(runtime, cache)
        chosen = None if recipe is None else parts_of(load_recipe(recipe), cache, runtime)
        show(api_matrix(chosen), json, render_check.matrix)
        return
    from quern.pipeline.stacking.check import check as api

    assert recipe is not None
    with working() as progress:
        report = api(
            recipe, runtime=runtime, cache=cache, model=model, tensor_parallel=tensor_parallel, progress=progress
        )
    show(report, json, render_check.report)
    if report.label == "refuses":
        raise typer.Exit(1)
