"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from locked_versions import departures
from tiny_model import calibration_text, write_model

UNLOCKED = departures()


def pytest_configure(config: pytest.Config) -> None:
    """pyproject.toml makes every warning an error. That is for the locked versions, whose warnings are all known: what
    another version of somebody else's package deprecates is shown at the end, and fails nobody's checkout."""
    if UNLOCKED:
        config.addinivalue_line("filterwarnings", "default")


def pytest_report_header() -> str:
    """Which of both it is, and why."""
    if not UNLOCKED:
        return "warnings are errors: versions are those of requirements/dev.txt"
    more = f" and {len(UNLOCKED) - 3} more" if UNLOCKED[3:] else ""
    return f"warnings are shown: not as in requirements/dev.txt: {', '.join(UNLOCKED[:3])}{more}"


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Matrices are tiny in tests: torch's threads would spend their time waiting for each other."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quiet_machine() -> Iterator[None]:
    """Nobody else seems to use the machine while rounds are timed: rows get no note about it, nothing is repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quern.core.foreign_load.ForeignLoad.processors", lambda _: 0.0)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a random Qwen2 of three blocks (see ``tests/tiny_model.py``). Not to be written to."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A file of calibration text for it."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(calibration_text(), "utf-8")
    return path
