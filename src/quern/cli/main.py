"""The command ``quern``: one verb per file in this folder; this file only gathers them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated, Any

import typer

import quern
from quern.cli import options
from quern.cli.bench import app as bench
from quern.cli.chat import chat
from quern.cli.check import check
from quern.cli.compare import compare
from quern.cli.evaluate import evaluate
from quern.cli.export import export
from quern.cli.forecast import forecast
from quern.cli.generate import generate
from quern.cli.inspect import inspect
from quern.cli.peers import app as peers
from quern.cli.plan import plan
from quern.cli.probe import probe
from quern.cli.quantize import quantize
from quern.cli.recipes import recipes
from quern.cli.recommend import recommend
from quern.cli.report import report
from quern.cli.serve import serve
from quern.cli.status import status
from quern.cli.terminal.language import Command, Group, chosen, language_first
from quern.cli.terminal.outcome import end_by_exception, global_options
from quern.cli.terminal.streams import forget_impossible_width, open_standard
from quern.cli.train import train
from quern.cli.write import write
from quern.core.text.language import VARIABLE

VERBS: tuple[Callable[..., Any], ...] = (
    check,
    forecast,
    plan,
    quantize,
    train,
    export,
    evaluate,
    compare,
    report,
    recommend,
    inspect,
    status,
    generate,
    chat,
    write,
    serve,
    probe,
    recipes,
)

app = typer.Typer(
    name="quern",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"quern {quern.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: quern compare models/python-7m -o comparison")
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    language: Annotated[
        str | None,
        typer.Option(
            "--language",
            metavar="CODE",
            envvar=VARIABLE,
            help="Language of help, answers and reports: en or zh. JSON stays English.",
            show_default="the locale's",
            callback=chosen,
            is_eager=True,
        ),
    ] = None,
) -> None:
    """Quantize large language models on the machine you have, measure what it cost, and learn which result to use."""
    global_options.debug = debug


for _verb in VERBS:
    app.command(_verb.__name__, cls=Command, epilog=f"Example: {_verb.example}")(_verb)  # type: ignore[attr-defined]

app.add_typer(bench, name="bench")
app.add_typer(peers, name="peers")


def run() -> None:
    """Entry point of the console script."""
    end_by_exception()
    open_standard()
    forget_impossible_width()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what the terminal cannot show comes out escaped instead of failing
            stream.reconfigure(errors="backslashreplace")
    app(options.repeat_options(language_first(sys.argv[1:])))
