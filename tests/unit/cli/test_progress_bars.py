"""Bars on a terminal, lines elsewhere."""

import io

from rich.console import Console

from quern.cli.progress import RichProgress


def drawn(terminal: bool) -> str:
    stream = io.StringIO()
    with RichProgress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        task = progress.task("calibrating [x]", total=4)
        task.advance()
        task.advance(0.5)
        progress.log("block 1 of 4 [done]")
        task.done()
    return stream.getvalue()


def test_terminal_shows_bars_and_time_left():
    text = drawn(terminal=True)
    assert "calibrating" in text
    assert "left" in text
    assert "block 1 of 4 [done]" in text


def test_elsewhere_only_lines():
    assert drawn(terminal=False) == "block 1 of 4 [done]\n"
