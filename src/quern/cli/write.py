"""``quern write``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quern.cli import options
from quern.cli.terminal.outcome import show, verb, working
from quern.cli.terminal.streams import kept_pipes


@verb("quern write models/python-7m -o own.jsonl --tokens 4096", resumes=True)
def write(
    model: options.ArtifactPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="File to write.", show_default=False)
    ],
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text or records (JSON, CSV, Parquet) whose beginnings to go on from; one or several.",
            exists=True,
            dir_okay=False,
            callback=kept_pipes,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of all records, beginnings included.")] = 65536,
    begin: Annotated[int, typer.Option(min=1, help="Tokens of a text that a record begins with.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Most tokens of a record, or of an answer.")] = 512,
    temperature: options.Temperature = 1,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1,
    seed: options.Seed = 0,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    engine: options.EngineName = "auto",
    json: options.Json = False,
) -> None:
    """Let a model write calibration text in its own words: it goes on from texts, and answers the questions of chats.

    Give the file to quern quantize as --calibration. The same command continues after an interruption.
    """
    from quern.cli.views.writing import written_text
    from quern.pipeline.writing.write_text import write_text as api

    with working() as progress:
        report = api(
            model,
            output,
            texts=texts or (),
            tokens=tokens,
            begin=begin,
            length=length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            fresh=fresh,
            threads=threads,
            engine=engine,
            progress=progress,
        )
    show(report, json, written_text)
