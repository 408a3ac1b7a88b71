"""``quern chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.text import Text

from quern.cli import options
from quern.cli.terminal.outcome import say, show, tell, verb, working
from quern.core.text.encoding import decode_utf8
from quern.core.text.language import gettext


@verb("quern chat quantized --system 'Answer in one sentence.'")
def chat(
    path: options.ArtifactPath,
    system: Annotated[str | None, typer.Option(help="Instruction before the conversation.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same answers.")] = 0,
    threads: options.Threads = None,
    engine: options.EngineName = "auto",
    cache: options.CacheName = None,
    speculate: options.Speculate = "none",
    draft: options.Draft = None,
    draft_tokens: options.DraftTokens = 8,
    json: options.Json = False,
) -> None:
    """Talk to the model at PATH: one line of stdin is one message; an empty line or the end of input ends."""
    from quern.generation.chat import Chat

    with working():
        conversation = Chat(
            path,
            system=system,
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
    turns = []
    for message in _messages():
        pieces = conversation.reply(message)
        if json:
            turns.append({"user": message, "assistant": "".join(pieces)})
        else:
            _stream(pieces)
    if json:
        show(turns, True, Text)


def _messages() -> Iterator[str]:
    """Lines of stdin in UTF-8, with a prompt in front where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = decode_utf8(gettext("standard input"), sys.stdin.buffer.readline())
        if not line.strip():
            return
        yield line.rstrip("\r\n")


def _stream(pieces: Iterator[str]) -> None:
    """Print an answer as it comes; Ctrl-C ends the answer, not the conversation."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        say(gettext("[stopped]"), stderr=True)
    print(flush=True)
