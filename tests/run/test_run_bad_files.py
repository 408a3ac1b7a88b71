"""Broken files against quern-run with sanitizers: refused with one line, or harmless."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import make_artifact
from bad_files.corpus import CASES

from quern.pipeline.export import export

TOOL = Path(__file__).resolve().parents[2] / "tools/fuzz_run_files.py"
INPUTS = 100


@pytest.fixture(scope="module")
def good(tiny_model, tiny_text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    choices = {"weights": {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 32}}
    artifact = make_artifact(tiny_model, folder / "artifact", tiny_text, **choices)
    return export(artifact, folder / "good.run", format="run").path


def test_damaged_files_run_or_are_refused(program, good):
    command = [sys.executable, TOOL, program.path, good, "--inputs", str(INPUTS), "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    tally = json.loads(ended.stdout)
    assert tally["ran"] + tally["refused"] == INPUTS
    assert min(tally["ran"], tally["refused"]) > INPUTS / 20


def test_the_tool_sees_what_is_wrong(tmp_path, good):
    faulty = tmp_path / "faulty"
    faulty.write_text("#!/bin/sh\necho oops >&2\nexit 3\n")
    faulty.chmod(0o755)
    command = [sys.executable, TOOL, faulty, good, "--inputs", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ended with 3" in ended.stderr


@pytest.mark.parametrize("length", [1, 63, 64, 100, -1])
def test_a_file_that_was_cut_is_refused(program, good, tmp_path, length):
    cut = tmp_path / "cut.run"
    cut.write_bytes(good.read_bytes()[:length])
    ended = program.run(cut, "-p", "a")
    assert ended.code == 2
    assert str(cut) in ended.err


def test_another_version_is_refused(program, good, tmp_path):
    other = bytearray(good.read_bytes())
    struct.pack_into("<I", other, 8, 99)
    (tmp_path / "other.run").write_bytes(other)
    ended = program.run(tmp_path / "other.run", "-p", "a")
    assert ended.code == 2
    assert "of version 99; this program reads version 1" in ended.err


@pytest.mark.parametrize("case", CASES[::6], ids=lambda case: case.name)
def test_what_is_no_run_file_is_refused(program, case, tmp_path):
    """Checkpoints of the corpus, folders and single files."""
    place = case.build(tmp_path)
    files = [place] if place.is_file() else [place, *(file for file in place.iterdir() if file.is_file())]
    for file in files[:4]:
        ended = program.run(file, "-p", "a")
        assert (ended.code, ended.out) == (2, b"")
        assert ended.err.startswith(f"error: {file}")
