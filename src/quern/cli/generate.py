"""``quern generate``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from quern.cli import options
from quern.cli.terminal.outcome import show, tell, verb, working


@verb('quern generate quantized --prompt "def add(a, b):" --max-tokens 40')
def generate(
    path: options.ArtifactPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 128,
    temperature: options.Temperature = 0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same text.")] = 0,
    threads: options.Threads = None,
    engine: options.EngineName = "auto",
    cache: options.CacheName = None,
    speculate: options.Speculate = "none",
    draft: options.Draft = None,
    draft_tokens: options.DraftTokens = 8,
    json: options.Json = False,
) -> None:
    """Continue --prompt with the model at PATH; the text streams to stdout."""
    from quern.generation.generate import generate as api

    with working():
        pieces = api(
            path,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            threads=threads,
            engine=engine,
            cache=cache,
            speculate=speculate,
            draft=draft,
            draft_tokens=draft_tokens,
            tell=tell,
        )
        text = "".join(pieces) if json else None
    if json:
        show({"prompt": prompt, "text": text}, True, Text)
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
