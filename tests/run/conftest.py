"""The program that these tests are about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from run_programs import Program, build, missing


@pytest.fixture(scope="session")
def program() -> Program:
    """quern-run with AddressSanitizer and UndefinedBehaviorSanitizer: whatever a test does, memory is watched.

    QUERN_RUN_FOLDER: the build folder of another one, to be tested instead.
    """
    if (other := os.environ.get("QUERN_RUN_FOLDER")) is not None:
        return Program(Path(other))
    if (reason := missing("cmake", "g++")) is not None:
        pytest.skip(reason)
    return Program(build("run-tests", "-DQUERN_ISAS=scalar", "-DQUERN_SANITIZE=ON"))
