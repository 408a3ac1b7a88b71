"""The fuzzer of whole artifacts: a short run, and that it would tell if something crashed, hung or raised."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from artifacts import make_artifact
from gguf_model import tensor_count, write_gguf

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FAULTY = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import fuzz_artifacts
fuzz_artifacts.PATIENCE = 1
def damage(files, generator):
    fault = generator.randrange(10)
    if fault == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == 1:
        raise KeyError("zap")
    if fault == 2 and generator.random() < 0.5:
        time.sleep(60)
fuzz_artifacts.damage = damage
sys.exit(fuzz_artifacts.main())
"""


@pytest.fixture(scope="module")
def artifact(tiny_model, tiny_text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed") / "artifact"
    choices = {"weights": {"codec": "trellis", "bits": 2}, "transforms": [{"method": "hadamard"}]}
    return make_artifact(tiny_model, folder, tiny_text, **choices)


@pytest.fixture
def run(forking, tmp_path) -> Callable[..., tuple[int, dict[str, int], str]]:
    """The exit code of Python, the tally that it prints, and what it writes to stderr."""

    def run(*command: object) -> tuple[int, dict[str, int], str]:
        ended = forking.ended(tmp_path, *map(str, command))
        return ended.returncode, json.loads(ended.stdout), ended.stderr

    return run


def test_damaged_artifacts_run_or_are_refused(run, artifact):
    code, tally, errors = run(TOOLS / "fuzz_artifacts.py", artifact, "--inputs", 250, "--seed", 7)
    assert code == 0, errors
    assert min(tally[key] for key in ("ran", "refused", "matrix multiplied", "matrix refused")) > 0, tally
    assert sum(tally[key] for key in ("ran", "refused", "matrix multiplied", "matrix refused")) == 250


def test_damaged_coded_artifacts_run_or_are_refused(run, tiny_model, tiny_text, tmp_path):
    """Streams, tables of frames and what config.json says of them."""
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    folder = make_artifact(tiny_model, tmp_path / "coded", tiny_text, weights={"codec": "none"}, storage="entropy")
    code, tally, errors = run(TOOLS / "fuzz_artifacts.py", folder, "--inputs", 150, "--seed", 11)
    assert code == 0, errors
    assert tally["refused"] > 20, tally
    assert tally["ran"] > 0, tally


def test_damaged_folders_and_ggufs_run_or_are_refused(run, tiny_model, tmp_path):
    """What loaders read besides artifacts: an unquantized folder with its tokenizer, and a GGUF in two parts."""
    parts = write_gguf(tiny_model, tmp_path / "m", parts=[5, tensor_count(tiny_model) - 5])
    code, tally, errors = run(
        TOOLS / "fuzz_artifacts.py", tiny_model, parts[1], "--inputs", 250, "--seed", 3, "--workers", 1
    )
    assert code == 0, errors
    assert min(tally[key] for key in ("ran", "refused")) > 20, tally


def test_faults_are_found_and_cost_no_other_input(run, artifact):
    code, tally, errors = run("-c", FAULTY, TOOLS, artifact, "--inputs", 60, "--workers", 2)
    assert code == 1
    assert min(tally[key] for key in ("crashed", "hung", "other error", "ran")) > 0, tally
    assert sum(count for key, count in tally.items() if key not in ("inputs", "seed", "seconds")) == 60
    assert "KeyError: 'zap'" in errors
    assert errors.count("crashed: status -9") == tally["crashed"]


def test_what_runs_nowhere_is_not_fuzzed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, str(TOOLS / "fuzz_artifacts.py"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert "runs on no engine" in ended.stderr
