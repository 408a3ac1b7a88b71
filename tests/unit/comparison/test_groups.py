"""Timed rounds while other programs come and go: repeated where they disturb, and never without a word about them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quern.comparison import groups as module
from quern.comparison.groups import REPEATS, Group, Loaded, alternate_rounds
from quern.comparison.inputs import MeasurementSettings
from quern.comparison.row_builder import Contender
from quern.core.progress import Silent
from quern.core.results import FOREIGN_LIMIT

ROUND = {
    "prompt_tokens": 1,
    "prefill_s": 1.0,
    "time_to_first_token_s": 1.0,
    "decode_tokens": 32,
    "decode_joules": None,
}


class Timer:
    """Stands for the processes that are timed: a round takes ``seconds``, and others keep ``loads`` processors busy."""

    process_id = 1

    def __init__(self, seconds: float, loads: list[float]) -> None:
        self.seconds, self.loads = seconds, loads
        self.now, self.rounds, self.looks = 0.0, 0, 0

    def ask(self, request, advance=None):
        if request["decode_tokens"] > module.WARM_UP_TOKENS:
            self.rounds += 1
        self.now += self.seconds
        return {"raw": {**ROUND, "decode_s": float(self.rounds)}}

    def look(self, leaders):
        begin, timer = self.now, self

        class Look:
            @property
            def seconds(self):
                return timer.now - begin

            def processors(self):
                timer.looks += 1
                return timer.loads[timer.looks - 1]

        return Look()


def timed(monkeypatch, seconds: float, loads: list[float], rounds: int = 3) -> tuple[Timer, Loaded]:
    timer = Timer(seconds, loads)
    monkeypatch.setattr(module, "ForeignLoad", timer.look)
    member = Loaded(Contender(name="a", path="a"), timer)
    settings = MeasurementSettings(speed_rounds=rounds, decode_tokens=32)
    alternate_rounds(Group([member], SimpleNamespace(prompt=[1], notes=()), settings, Silent(), []))
    return timer, member


def taken(member: Loaded) -> list[float]:
    """Which rounds count: each takes as many seconds as its number."""
    return [raw["decode_s"] for raws in member.rounds for raw in raws.values()]


def test_short_sweeps_share_a_look(monkeypatch):
    timer, member = timed(monkeypatch, 0.01, [0.1])
    assert (timer.rounds, timer.looks) == (3, 1)
    assert member.foreign == [0.1, 0.1, 0.1]
    assert member.measured().foreign_load == 0.1


def test_short_sweeps_that_were_disturbed_are_repeated_and_marked(monkeypatch):
    timer, member = timed(monkeypatch, 0.01, [2.0, 1.0])
    assert (timer.rounds, timer.looks) == (3 + REPEATS, 2)
    assert taken(member) == [4.0, 5.0, 1.0]
    assert member.measured().foreign_load == 1.0
    assert member.measured().notes == ("timed while other programs kept 1.00 processors busy",)


def test_long_sweeps_are_looked_at_one_by_one(monkeypatch):
    timer, member = timed(monkeypatch, 2.0, [0.0, 1.5, 0.1, 0.2])
    assert (timer.rounds, timer.looks) == (4, 4)
    assert taken(member) == [1.0, 3.0, 4.0]
    assert member.measured().foreign_load == 0.1
    assert member.measured().notes == ()


def test_looks_end_when_enough_sweeps_were_quiet(monkeypatch):
    timer, member = timed(monkeypatch, 0.3, [0.0, 0.0])
    assert (timer.rounds, timer.looks) == (3, 2)
    assert len(member.foreign) == 3


@pytest.mark.parametrize("seconds", [0.01, 2.0])
def test_a_machine_that_is_never_quiet_is_not_measured_for_ever(monkeypatch, seconds):
    timer, member = timed(monkeypatch, seconds, [2 * FOREIGN_LIMIT] * 9)
    assert timer.rounds == 3 + REPEATS
    assert len(member.foreign) == len(member.rounds) == 3
    assert member.measured().notes
