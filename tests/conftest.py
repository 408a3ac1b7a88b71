"""What all tests share."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from locked_versions import departures
from tiny_model import calibration_text, write_model
from warm_workers import Forking

# Threads that spin while they wait take the processors from the other process of tests, and from what tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Messages are looked for in English, whatever the machine speaks.
os.environ["QUERN_LANGUAGE"] = "en"
UNLOCKED = departures()
LONGEST = (
    "run/test_run_arm.py",
    "run/test_run_program.py",
    "end_to_end/test_stacked_pairs.py",
    "end_to_end/test_quantize_memory.py",
    "end_to_end/test_quantize.py",
    "unit/pipeline/test_peer_rows.py",
    "end_to_end/test_quantize_resume.py",
    "end_to_end/test_rounding_choices.py",
    "end_to_end/test_scale_dtypes.py",
    "end_to_end/test_command_line.py",
    "end_to_end/test_ray.py",
    "unit/documentation/test_readme.py",
    "bad_files/test_fuzz_artifacts.py",
    "end_to_end/test_train.py",
    "contract/test_readers.py",
    "drop_in/test_drop_in.py",
    "unit/documentation/test_contributing.py",
)
"""Files that take longest, the first one first: several processes that share the tests then end at about the same time."""


def pytest_configure(config: pytest.Config) -> None:
    """pyproject.toml makes every warning an error. That is for the locked versions, whose warnings are all known: what
    another version of somebody else's package deprecates is shown at the end, and fails nobody's checkout."""
    if UNLOCKED:
        config.addinivalue_line("filterwarnings", "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all else stays as it was found."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported meanwhile is never garbage, and need not be looked through again and again, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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
    """Nobody else seems to use the machine while rounds are timed: rows get no note about it, nothing is repeated.

    Its rates are measured with little: they are there, and mean nothing.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quern.core.machine.foreign_load.ForeignLoad.processors", lambda _: 0.0)
        patch.setattr("quern.advisor.hardware.BUFFER_BYTES", 1 << 22)
        patch.setattr("quern.advisor.hardware.GEMM_SHAPE", (64, 64, 64))
        yield


@pytest.fixture(scope="session")
def forking() -> Iterator[Forking]:
    """Starts Python in no time, from the folder it is told (see ``tests/warm_workers.py``)."""
    with contextlib.closing(Forking()) as found:
        yield found


@pytest.fixture(scope="module")
def warm_workers(forking: Forking) -> Iterator[None]:
    """Processes that measure are forks of one in which everything is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quern.comparison.worker_process.subprocess", forking)
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
