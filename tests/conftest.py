"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import calibration_text, write_model


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
