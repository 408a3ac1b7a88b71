"""Other tools in the table, and what they may do wrong: a fake tool in real processes, driven through ``compare``."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import fake_peer
import psutil
import pytest

from quern.core.errors import UserError
from quern.core.results import load_results
from quern.peers.base import PEERS, choices_of
from quern.peers.environment import Environment, Installed, PeerError
from quern.pipeline import peers as module
from quern.pipeline.compare import compare
from quern.pipeline.peers import catalogue, examine

TEXT = "Some text that a model can read, and a little more of it so that it suffices. " * 4
INSTALLED = Installed(
    peer="fake", version="1.5", requirements=[], python="3.11", created="2026-01-01T00:00:00+00:00", versions={}
)


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    """The fake tool among the peers, installed in a folder of the test's own."""
    PEERS.names()
    monkeypatch.setitem(PEERS._entries, "fake", fake_peer.FakePeer)
    command = property(lambda self: [sys.executable, fake_peer.__file__])
    monkeypatch.setattr(Environment, "command", command)
    folder = tmp_path / "environments" / "fake"
    folder.mkdir(parents=True)
    (folder / "installed.json").write_text(json.dumps(asdict(INSTALLED)))
    return tmp_path / "environments"


def run(tiny_model, tiny_text, output, *variants, environments, **options):
    text = output.parent / "text.txt"
    text.write_text(TEXT)
    return compare(
        tiny_model,
        output,
        recipes=options.pop("recipes", ()),
        peers=[f"fake:{variant}" for variant in variants],
        calibration=[tiny_text],
        texts=[text],
        tokens=60,
        speed_rounds=1,
        prompt_tokens=8,
        decode_tokens=4,
        threads=1,
        environments=environments,
        engine="reference",
        **options,
    )


def row(results, name):
    return next(row for row in results.rows if row.name == name)


def test_rows_of_a_tool_that_works(tiny_model, tiny_text, tmp_path, fake):
    results = run(tiny_model, tiny_text, tmp_path / "out", "good", "calibrated", environments=fake)
    assert [r.name for r in results.rows] == ["unquantized", "fake-good", "fake-calibrated"]
    assert results.failures == []
    good, calibrated = results.rows[1:]
    # The artifact is the model itself: what runs in the tool's process is measured by the same rules.
    assert good.kl_mean == pytest.approx(results.rows[0].kl_mean, rel=1e-6)
    assert good.bits_per_weight == 16.0
    assert good.bytes == results.rows[0].bytes + len("good")
    assert good.decode_tokens_per_s > 0
    assert good.quantize_seconds > 0
    assert good.quantize_peak_rss_bytes > 50 << 20
    assert good.tool.model_dump() == {
        "name": "Fake Tool",
        "version": "1.5",
        "licence": "MIT",
        "runtime": "transformers",
        "targets": ["transformers"],
        "homepage": "https://example.org",
    }
    assert good.recipe["settings"] == {"behaviour": "good"}
    assert good.notes == []
    assert calibrated.notes == ["calibrated on 16384 tokens"]
    assert load_results(tmp_path / "out" / "results.json") == results
    assert not list(Path.cwd().glob("litter"))


def test_finished_rows_are_not_made_or_measured_again(tiny_model, tiny_text, tmp_path, fake, monkeypatch):
    first = run(tiny_model, tiny_text, tmp_path / "out", "good", environments=fake)

    class Refuses(module.Worker):
        def __init__(self, name, *rest):
            raise AssertionError(f"{name} was started again")

    monkeypatch.setattr(module, "Worker", Refuses)
    monkeypatch.setattr("quern.pipeline.measure.Worker", Refuses)
    again = run(tiny_model, tiny_text, tmp_path / "out", "good", environments=fake)
    assert again.rows == first.rows
    with pytest.raises(AssertionError, match="fake-good was started again"):
        run(tiny_model, tiny_text, tmp_path / "out", "good", environments=fake, seed=1)
    with pytest.raises(AssertionError, match="started again"):
        run(tiny_model, tiny_text, tmp_path / "out", "good", environments=fake, fresh=True)


FAULTS = {
    "hang": ("quantize", "has said nothing for|took longer than"),
    "crash": ("quantize", r"SIGSEGV(.|\n)*the last words"),
    "garbage": ("quantize", "which is no answer"),
    "memory": ("quantize", r"used .* GB of memory; it may use .* GB"),
    "nothing": ("quantize", "holds no weights"),
    "raise": ("quantize", "groups of 64 do not divide 96"),
    "unloadable": ("load", "no kernel for this processor"),
    "dies": ("measure", "SIGKILL"),
}


def test_whatever_a_tool_does_is_the_reason_of_its_row(tiny_model, tiny_text, tmp_path, fake):
    """One run with every fault: the tool that works and quern's own recipe are measured all the same."""
    results = run(
        tiny_model,
        tiny_text,
        tmp_path / "out",
        *FAULTS,
        "nan",
        "good",
        environments=fake,
        recipes=["rtn4"],
        memory=2 << 30,
        peer_time_limit=20.0,
    )
    assert [r.name for r in results.rows] == ["unquantized", "rtn4", "fake-nan", "fake-good"]
    assert {failure.name: failure.stage for failure in results.failures} == {
        f"fake-{name}": stage for name, (stage, _) in FAULTS.items()
    }
    import re

    for failure in results.failures:
        assert failure.tool == "Fake Tool"
        pattern = FAULTS[failure.name.removeprefix("fake-")][1]
        assert re.search(pattern, failure.reason), failure
    nan = row(results, "fake-nan")
    assert nan.kl_mean is None
    assert nan.notes[-1].startswith("accuracy not measured: fake-nan: logits holds")
    assert row(results, "fake-good").kl_mean == pytest.approx(results.rows[0].kl_mean, rel=1e-6)
    artifacts = tmp_path / "out" / "artifacts"
    assert not list(artifacts.glob(".*"))
    for name in FAULTS:
        assert (artifacts / f"fake-{name}").exists() == (name in ("unloadable", "dies"))
    for path in artifacts.glob("*.pid"):
        for process in map(int, path.read_text().split()):
            assert _gone(process), f"{path.name}: a process was left running"


def _gone(process_id):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_an_installation_that_fails_is_a_failed_row(tiny_model, tiny_text, tmp_path, fake, monkeypatch):
    (fake / "fake" / "installed.json").unlink()

    def fails(self, command):
        raise PeerError("Fake Tool could not be installed; install.log ends with:\nno such wheel")

    monkeypatch.setattr(Environment, "_run", fails)
    results = run(tiny_model, tiny_text, tmp_path / "out", "good", environments=fake, recipes=["rtn4"])
    assert [r.name for r in results.rows] == ["unquantized", "rtn4"]
    (failure,) = results.failures
    assert (failure.stage, failure.name) == ("install", "fake-good")
    assert "no such wheel" in failure.reason


def test_an_installed_version_that_the_adapter_does_not_know(tiny_model, tiny_text, tmp_path, fake):
    (fake / "fake" / "installed.json").write_text(json.dumps({**asdict(INSTALLED), "version": "2.1"}))
    results = run(tiny_model, tiny_text, tmp_path / "out", "good", environments=fake)
    assert results.rows[1].notes == ["Fake Tool 2.1 is installed; the adapter is written for >=1,<2"]
    assert results.rows[1].tool.version == "2.1"


def test_unknown_names(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"unknown peer 'hqqq'; known: .*hqq"):
        compare(tiny_model, tmp_path / "out", peers=["hqqq"])
    with pytest.raises(UserError, match=r"Fake Tool has no variant 'int5'; known: good, "):
        compare(tiny_model, tmp_path / "out", peers=["fake:int5"])
    with pytest.raises(UserError, match="fake-good twice"):
        choices_of(["fake", "fake:good"])
    assert not (tmp_path / "out").exists()


def test_a_file_is_refused(tiny_model, tiny_text, tmp_path, fake):
    with pytest.raises(UserError, match="fake-good twice"):
        compare(tiny_model, tmp_path / "out", recipes=[], peers=["fake:good", "fake:good"])


def test_doctor(tmp_path, fake):
    health = examine("fake", tmp_path, fake)
    assert (health.installed, health.healthy, health.problem) == ("1.5", True, None)
    (fake / "fake" / "installed.json").write_text(json.dumps({**asdict(INSTALLED), "version": "3"}))
    assert "written for >=1,<2" in examine("fake", tmp_path, fake).problem
    (fake / "fake" / "installed.json").write_text("{")
    assert examine("fake", tmp_path, fake).healthy is None


def test_the_catalogue_lists_every_tool(fake):
    listed = {tool["name"]: tool for tool in catalogue(fake)}
    assert sorted(listed) == PEERS.names()
    assert listed["fake"]["installed"] == "1.5"
    assert {variant["name"] for variant in listed["fake"]["variants"]} == set(fake_peer.BEHAVIOURS)
    assert os.path.isabs(listed["fake"]["folder"])
