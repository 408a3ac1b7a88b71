"""Every verb that writes, into places where files of the user's lie: refused at once, and nothing is touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from sample_results import sample_results
from typer.main import get_command
from typer.testing import CliRunner

from quern.checkpoint.jobs.lock import acquire
from quern.cli.main import app
from quern.pipeline.comparing.comparison_folder import ComparisonFolder

COMMANDS = {
    "plan": ("plan", "model", "-o", "out/plan.yaml"),
    "quantize": ("quantize", "model", "-o", "out", "--recipe", "rtn4"),
    "train": ("train", "model", "-o", "out", "--recipe", "rtn4"),
    "compare": ("compare", "model", "-o", "out", "--recipes", "rtn4", "--peers", "hqq"),
    "export": ("export", "artifact", "-o", "out/model.gguf"),
    "report": ("report", "results.json", "-o", "out/report.html"),
    "write": ("write", "model", "-o", "out/own.jsonl"),
}
"""Every verb that takes an output, and how it is asked to write below ``out``."""
STRANGERS = {
    "plan": ("plan.yaml",),
    "quantize": ("notes.txt", "config.json", "quern.json", "sub/file", ".quern-work/file"),
    "train": ("notes.txt", "config.json", "quern.json", "sub/file", ".quern-work/file"),
    "compare": (
        *("results.json", "report.html", "artifacts", "artifacts/rtn4/file", "artifacts/rtn4.json", "artifacts/rtn4"),
        *("artifacts/hqq-int4-g64/file", "artifacts/hqq-int4-g64.json", "cache", "cache/windows.txt"),
    ),
    "export": ("model.gguf",),
    "report": ("report.html",),
    "write": ("own.jsonl",),
}
REFUSALS = ("not written by quern", "not an artifact of quern", "not a quern work folder", "is no folder")
CASES = [
    (verb, stranger, fresh)
    for verb, strangers in STRANGERS.items()
    for stranger in strangers
    for fresh in ((), ("--fresh",))
    if not (fresh and verb == "report")
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Has a model that nobody gets to read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "results.json").write_text(sample_results().model_dump_json())
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Contents of files and links, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def test_every_verb_with_an_output_is_walked():
    verbs = get_command(app).commands
    writing = {name for name, verb in verbs.items() if any("--output" in parameter.opts for parameter in verb.params)}
    assert writing == set(COMMANDS) == set(STRANGERS)


@pytest.mark.parametrize(("verb", "stranger", "fresh"), CASES, ids=[" ".join((v, s, *f)) for v, s, f in CASES])
def test_files_of_the_users_are_refused_and_kept(folder, verb, stranger, fresh):
    path = folder / "out" / stranger
    path.parent.mkdir(parents=True)
    path.write_text('{"fingerprint": "mine"}')
    before = snapshot(folder)
    ended = run(*COMMANDS[verb], *fresh)
    assert ended.exit_code == 2, ended.stderr
    said = ended.stderr.replace("\n", " ")
    assert any(words in said for words in REFUSALS), said
    assert "out" in said
    assert snapshot(folder) == before


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("place", ["file", "pipe", "loop", "model"])
def test_an_output_that_is_something_else(folder, verb, place):
    (folder / "file").write_text("mine")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "model" / "config.json").write_text("{}")
    before = snapshot(folder)
    ended = run(*[place if word.startswith("out") else word for word in COMMANDS[verb]])
    assert ended.exit_code == 2, ended.stderr
    assert "internal error" not in ended.stderr
    assert place in ended.stderr
    assert snapshot(folder) == before


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("given", ["", "x" * 300, "results.json/out", "/proc/out"])
def test_an_output_that_cannot_be(folder, verb, given):
    before = snapshot(folder)
    ended = run(*[given if word.startswith("out") else word for word in COMMANDS[verb]])
    assert ended.exit_code == 2, ended.stderr
    assert "error: " in ended.stderr
    assert "internal error" not in ended.stderr
    assert snapshot(folder) == before


@pytest.mark.parametrize("given", [".", "model", "new/", "./"])
def test_a_folder_as_the_file_of_a_report(folder, given):
    before = snapshot(folder)
    ended = run("report", "results.json", "-o", given)
    assert ended.exit_code == 2, ended.stderr
    assert "is a folder, and a file is to be written" in ended.stderr
    assert snapshot(folder) == before


def test_a_report_replaces_only_a_report(folder):
    assert run("report", "results.json", "-o", "page.html").exit_code == 0
    page = (folder / "page.html").read_text("utf-8")
    old = page.replace('<meta name="generator" content="quern">\n', "")
    assert old != page
    for content in (page, old, ""):
        (folder / "page.html").write_text(content, "utf-8")
        assert run("report", "results.json", "-o", "page.html").exit_code == 0
        assert (folder / "page.html").read_text("utf-8") == page
    ended = run("report", "results.json", "-o", "results.json")
    assert ended.exit_code == 2
    assert "was not written by quern" in ended.stderr


def test_a_report_through_a_link(folder):
    (folder / "disk").mkdir()
    (folder / "page.html").symlink_to("disk/real.html")
    assert run("report", "results.json", "-o", "page.html").exit_code == 0
    assert (folder / "page.html").is_symlink()
    assert (folder / "disk" / "real.html").is_file()


def comparison(folder: Path) -> None:
    """What a comparison leaves, in small."""
    (folder / "artifacts" / "hqq-int4-g64").mkdir(parents=True)
    (folder / "artifacts" / "hqq-int4-g64.json").write_text('{"artifact_sha256": "a"}')
    (folder / "cache" / "measured").mkdir(parents=True)
    (folder / "cache" / "windows.npz").touch()
    (folder / "results.json").write_text(sample_results().model_dump_json())


def test_what_a_comparison_left_is_quern_s_and_the_rest_of_the_folder_is_no_obstacle(folder):
    out = folder / "out"
    comparison(out)
    (out / "notes.txt").write_text("mine")
    (out / "report.html").touch()
    place = ComparisonFolder("out", "model")
    place.check("model", ["rtn4"], ["hqq-int4-g64"], fresh=True)
    with place.locked():
        pass
    (out / "cache" / "added.txt").write_text("in a folder that says that it is a cache")
    place.check("model", ["rtn4"], ["hqq-int4-g64"], fresh=False)
    assert (out / "cache" / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert (out / "notes.txt").read_text() == "mine"


def test_two_comparisons_in_one_folder(folder, tiny_model):
    shutil.rmtree(folder / "model")
    shutil.copytree(tiny_model, folder / "model")
    lock = acquire(folder / "out" / "cache" / "lock", folder / "out")
    try:
        ended = run("compare", "model", "-o", "out", "--recipes", "rtn4")
    finally:
        os.close(lock)
    assert ended.exit_code == 2, ended.stderr
    assert f"another process (id {os.getpid()}) is working in" in ended.stderr
    assert not (folder / "out" / "results.json").exists()


def test_verbs_without_an_output_write_nothing(folder):
    before = snapshot(folder)
    assert run("recipes").exit_code == 0
    assert run("recommend", "results.json", "--scenario", "storage").exit_code == 0
    assert run("inspect", "model").exit_code == 2
    assert run("peers", "list").exit_code == 0
    assert snapshot(folder) == before
