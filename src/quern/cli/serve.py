"""``quern serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import say, tell, verb, working
from quern.core.errors import UserError
from quern.core.text.language import gettext, translatable

EXTRA = translatable("serving needs packages that are not installed: pip install 'quern[serve]' ({error})")


@verb("quern serve quantized --port 8080")
def serve(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Artifacts, folders or Hub ids; NAME=MODEL gives one a name of your choice."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all, so that other machines reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(help="Answer only those who give it.", envvar="QUERN_API_KEY", show_default=False),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a text with its answer, at most.", show_default="the model's"),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=1024, help="Requests that are answered at once.")] = 8,
    queue: Annotated[int, typer.Option(min=1, max=65536, help="Requests that may wait; more are refused (429).")] = 64,
    loaded: Annotated[
        int | None,
        typer.Option(min=1, help="Models in memory at once; others are loaded when asked for.", show_default="all"),
    ] = None,
    memory: options.Memory = None,
    threads: options.Threads = None,
    engine: options.EngineName = "auto",
    cache: options.CacheName = None,
    speculate: options.Speculate = "none",
    draft: options.Draft = None,
    draft_tokens: options.DraftTokens = 8,
    pooling: Annotated[
        str,
        typer.Option(
            metavar="HOW", help="A text's vector from its tokens': mean, last, or auto (as the model's files say)."
        ),
    ] = "auto",
) -> None:
    """Answer requests over HTTP: OpenAI's and Anthropic's protocols, and a page to chat in, until Ctrl-C."""
    try:
        from quern.generation.speculation.opening import SpeculationOptions
        from quern.serving.server import Served, run
    except ImportError as error:
        raise UserError(gettext(EXTRA, error=error)) from None
    named, limit = [_named(path) for path in paths], options.optional_size(memory, "--memory")
    with working():
        run(
            Served(
                models=dict(named),
                host=host,
                port=port,
                key=api_key or None,
                context=context,
                parallel=parallel,
                waiting=queue,
                loaded=loaded,
                memory=limit,
                threads=threads,
                engine=engine,
                cache=cache,
                speculation=SpeculationOptions(speculate, draft, draft_tokens),
                pooling=pooling,
            ),
            tell,
            lambda line: say(line, stderr=True),
        )


def _named(path: str) -> tuple[str, str]:
    """Name and path; without a name the last part of the path."""
    name, mark, rest = path.partition("=")
    if mark and name and "/" not in name and not Path(path).exists():
        return name, rest
    return Path(path).name or path, path
