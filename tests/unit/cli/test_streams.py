"""Texts that come through pipes, and standard descriptors that are closed."""

import os
import subprocess
import sys
import threading

import pytest
import typer
from sample_results import sample_results
from typer.testing import CliRunner

from quern.cli import options
from quern.cli.terminal import streams
from quern.core.errors import UserError

RECOMMEND = f"'{sys.executable}' -c 'from quern.cli.main import run; run()' recommend results.json"
"""A command that starts quickly, for it imports no torch."""


@pytest.fixture
def shell(tmp_path):
    """Runs a line of shell where ``results.json`` is."""
    (tmp_path / "results.json").write_text(sample_results().model_dump_json())
    return lambda line: subprocess.run(["sh", "-c", line], capture_output=True, timeout=120, cwd=tmp_path)


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("def f(): pass\n" * 100_000,))
    writer.start()
    yield tmp_path / "pipe"
    writer.join()


def run_reader(*paths):
    """A verb with ``--text`` that reads every text twice; its outcome and the paths that it was given."""
    app, given = typer.Typer(pretty_exceptions_enable=False), []

    @app.command()
    def job(text: options.Texts = None):
        given.extend(text or ())
        for path in given * 2:
            assert path.read_text().startswith("def f()")

    return CliRunner().invoke(app, [part for path in paths for part in ("--text", str(path))]), given


def test_a_pipe_is_kept_while_the_command_runs(pipe, tmp_path):
    (tmp_path / "a.txt").write_text("def f()")
    outcome, given = run_reader(tmp_path / "a.txt", pipe)
    assert outcome.exit_code == 0, outcome.output
    assert given[0] == tmp_path / "a.txt"
    assert given[1].name == "pipe"
    assert given[1] != pipe
    assert not given[1].parent.exists()


def test_a_pipe_that_cannot_be_kept(pipe, monkeypatch):
    def full(source, file):
        source.read()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streams.shutil, "copyfileobj", full)
    outcome, _ = run_reader(pipe)
    assert outcome.exit_code == 2
    assert "No space left on device" in outcome.output


def test_without_a_place_for_temporary_files(tmp_path, monkeypatch):
    def refused(purpose):
        raise UserError("no temporary files can be written")

    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(streams, "temporary_folder", refused)
    outcome, _ = run_reader(tmp_path / "pipe")
    assert outcome.exit_code == 2
    assert "no temporary files can be written" in outcome.output


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_descriptors_may_be_closed(closed, shell):
    done = shell(f"{RECOMMEND} --json {closed}")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.parametrize("columns", ["0", "-5", "wide", ""])
def test_a_width_that_is_none_is_as_if_it_were_not_given(columns, shell):
    shown = [shell(f"{width} {RECOMMEND}").stdout for width in ("env -u COLUMNS", f"COLUMNS='{columns}'")]
    assert shown[0] == shown[1]
    assert sample_results().recommendation.choice.encode() in shown[1]
