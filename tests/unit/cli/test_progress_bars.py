"""Bars on a terminal; elsewhere lines, not too many."""

import io

import pytest
from rich.console import Console

from quern.cli.terminal import progress as module
from quern.cli.terminal.progress import LineProgress, RichProgress, progress_on


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are added."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def drawn(work, terminal: bool) -> str:
    stream = io.StringIO()
    with progress_on(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        assert isinstance(progress, RichProgress if terminal else LineProgress)
        work(progress)
    return stream.getvalue()


def test_terminal_shows_bars_and_time_left():
    def work(progress):
        task = progress.task("calibrating [x]", total=4)
        task.advance()
        task.advance(0.5)
        progress.log("block 1 of 4 [done]")
        task.done()

    text = drawn(work, terminal=True)
    assert "calibrating [x]" in text
    assert "left" in text
    assert "block 1 of 4 [done]" in text


def test_elsewhere_a_line_every_ten_seconds_and_what_is_logged_at_once(clock):
    def work(progress):
        clock[0] += 3
        task = progress.task("quantizing [blocks]", total=40)
        for _ in range(8):
            clock[0] += 6
            task.advance()
        progress.log("almost [done]")
        task.done()

    assert drawn(work, terminal=False).splitlines() == [
        "quantizing [blocks]: 0 of 40",
        "quantizing [blocks]: 2 of 40, about 4 min left",
        "quantizing [blocks]: 4 of 40, about 4 min left",
        "quantizing [blocks]: 6 of 40, about 3 min left",
        "quantizing [blocks]: 8 of 40, about 3 min left",
        "almost [done]",
    ]


def test_what_is_over_soon_says_nothing(clock):
    def work(progress):
        for name in ("hashing", "quantizing blocks"):
            task = progress.task(name, total=2)
            clock[0] += 0.4
            task.advance(2)
            task.done()

    assert drawn(work, terminal=False) == ""


def test_the_interval_holds_for_all_tasks_together(clock):
    def work(progress):
        clock[0] += 5
        for _ in range(30):
            progress.task("timing", total=3).advance()
            clock[0] += 1

    assert len(drawn(work, terminal=False).splitlines()) == 3


def test_what_an_earlier_run_did_does_not_shorten_the_time_left(clock):
    def work(progress):
        task = progress.task("quantizing blocks", total=100, done=90)
        clock[0] += 60
        task.advance()

    assert drawn(work, terminal=False) == "quantizing blocks: 91 of 100, about 9 min left\n"


def test_bytes_are_told_as_a_share(clock):
    def work(progress):
        task = progress.task("hashing the checkpoint", total=4_000_000_000)
        clock[0] += 5
        task.advance(1_000_000_000)

    assert drawn(work, terminal=False) == "hashing the checkpoint: 25 %, about 15 s left\n"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (59, "59 s"), (89, "1 min"), (3599, "1 h 0 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds, said):
    assert module._duration(seconds) == said
