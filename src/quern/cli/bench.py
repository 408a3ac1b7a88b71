"""``quern bench``: how fast things are that run already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from quern.cli import options
from quern.cli.serve import EXTRA
from quern.cli.terminal.language import Command, Group
from quern.cli.terminal.outcome import INTERRUPTED, fail, show, verb, working
from quern.core.errors import UserError
from quern.core.text.language import gettext


@verb("quern bench serve models/python-7m --concurrency 1,4 --prompt-tokens 128 --answer-tokens 32")
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Serve this one and measure it; or give --url.", show_default=False),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="A server that runs already, ours or any with OpenAI's completions.", show_default=False
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its model, as requests name it.", show_default="its first one")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key.", envvar="QUERN_API_KEY", show_default=False)] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Loads of so many requests at once, each followed by the next.",
            show_default="1,4,8, without --rates",
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,...", help="Loads of so many requests a second, as a Poisson process.", show_default=False
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests of each load.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 512,
    answer_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = 128,
    shared_prefix: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Share of each prompt that all of them begin with.")
    ] = 0.0,
    seed: options.Seed = 0,
    parallel: Annotated[int, typer.Option(min=1, max=1024, help="MODEL: requests that are answered at once.")] = 8,
    threads: options.Threads = None,
    engine: options.EngineName = "auto",
    cache: options.CacheName = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="File to write, too.", show_default=False),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure a server: time to first token, inter-token latency and throughput under several loads.

    Prompts are random tokens. Ctrl-C shows what was measured until then. Exit code 1 if a request failed.
    """
    at_once = concurrency if concurrency or rates else "1,4,8"
    counts, speeds = _numbers(at_once, "--concurrency", int), _numbers(rates, "--rates", float)
    try:
        from quern.cli.views.bench import serving
        from quern.serving.benchmark.measure import bench_serve
        from quern.serving.benchmark.results import Load, Workload
    except ImportError as error:
        raise UserError(gettext(EXTRA, error=error)) from None
    loads = [*(Load(concurrency=count) for count in counts), *(Load(rate=speed) for speed in speeds)]
    with working() as progress:
        found = bench_serve(
            model,
            url=url,
            loads=loads,
            workload=Workload(prompt_tokens, answer_tokens, shared_prefix, requests, seed),
            name=name or "",
            key=api_key or None,
            parallel=parallel,
            threads=threads,
            engine=engine,
            cache=cache,
            output=output,
            progress=progress,
        )
    show(found, json, serving)
    if found.interrupted:
        fail(gettext("interrupted."), INTERRUPTED)
    if any(load.failed for load in found.loads):
        raise typer.Exit(1)


Number = TypeVar("Number", int, float)


def _numbers(text: str | None, option: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [kind(word) for word in options.names(text) or ()]
    except ValueError:
        told = {"option": option, "text": text, "example": "1,4,8" if kind is int else "0.5,1,2"}
        raise UserError(gettext("{option} {text}: numbers between commas, such as {example}", **told)) from None


app = typer.Typer(cls=Group, name="bench", no_args_is_help=True, help="Measure what runs already.")
app.command("serve", cls=Command, epilog=f"Example: {serve.example}")(serve)  # type: ignore[attr-defined]
