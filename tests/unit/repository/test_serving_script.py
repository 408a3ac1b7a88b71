"""benchmarks/serving.py: what is asked, and when memory counts as flat."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("serving")


def test_memory_is_judged_after_the_warm_up(script):
    def growth(*sizes):
        return script.flatness(list(enumerate(sizes)), len(sizes))

    assert growth(*[1] * 20) is None  # too few of them are after the first third
    steady = growth(*[1] * 30, *[100] * 60)
    assert (steady["growth"], steady["largest_bytes"]) == (0, 100)
    assert growth(*[100] * 60, *[103] * 30)["growth"] == pytest.approx(0.03)
    assert growth(*[100] * 60, *[99] * 30)["growth"] < 0


def test_questions_are_drawn_from_the_seed_and_share_beginnings(script):
    asked = script.questions(0)
    assert asked == script.questions(0) != script.questions(1)
    assert len({one["prompt"] for one in asked}) == script.QUESTIONS
    assert len({one["prompt"][:300] for one in asked[1::2]}) == 1
    assert all(one["temperature"] == 0 for one in asked)
