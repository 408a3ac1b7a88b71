"""Other tools in the table, and what they may do wrong: a fake tool in real processes, driven through ``compare``."""

import io
import json
import os
import shutil
import sys
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import fake_peer
import numpy as np
import psutil
import pytest
from rich.console import Console

from quern.cli.views import peers as render_peers
from quern.comparison.tool_process import examine
from quern.comparison.worker_process import WorkerError
from quern.core.errors import UserError
from quern.core.progress import Silent
from quern.core.results import load_results
from quern.peers import lock
from quern.peers.base import PEERS, peer_variants
from quern.peers.environment import Environment, Installed, PeerError
from quern.peers.listing import known_tools
from quern.pipeline.artifacts import ArtifactRequest
from quern.pipeline.compare import compare
from quern.pipeline.comparing import peers as module

pytestmark = pytest.mark.usefixtures("quiet_machine", "warm_workers")

TEXT = "Some text that a model can read, and a little more of it so that it suffices. " * 4
INSTALLED = Installed(
    peer="fake", version="1.5", requirements=[], python="3.11", created="2026-01-01T00:00:00+00:00", versions={}
)


def install(environments):
    """As if the fake tool were installed below this folder."""
    (environments / "fake").mkdir(parents=True)
    (environments / "fake" / "installed.json").write_text(json.dumps(asdict(INSTALLED)))
    return environments


@pytest.fixture(scope="module", autouse=True)
def among_the_peers():
    """The fake tool."""
    PEERS.names()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEERS._entries, "fake", fake_peer.FakePeer)
        patch.setattr(Environment, "command", property(lambda self: [sys.executable, fake_peer.__file__]))
        yield


@pytest.fixture(autouse=True)
def fake(tmp_path):
    """The fake tool's environment, in a folder of the test's own."""
    return install(tmp_path / "environments")


@pytest.fixture(scope="module")
def compared(tiny_model, tiny_text, tmp_path_factory):
    """The folder of a comparison in which the tool works, and its results."""
    folder = tmp_path_factory.mktemp("compared")
    environments = install(folder / "environments")
    return folder, run(tiny_model, tiny_text, folder / "out", "good", "calibrated", environments=environments)


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


def test_rows_of_a_tool_that_works(compared):
    folder, results = compared
    assert [r.name for r in results.rows] == ["unquantized", "fake-good", "fake-calibrated"]
    assert results.failures == []
    good, calibrated = results.rows[1:]
    # The artifact is the model itself: what runs in the tool's process is measured by the same rules.
    assert good.kl_mean == pytest.approx(results.rows[0].kl_mean, rel=1e-6)
    assert good.bits_per_weight == 16.0
    assert good.bytes == results.rows[0].bytes + len("good")
    assert good.decode_tokens_per_s > 0
    # What its products multiply is not declared, so no rate of the machine is their limit.
    assert good.prefill_tokens_per_s > 0
    assert good.prefill_limit_fraction is good.limit_gemm_gop_s is good.limit_gemm_dtype is None
    assert good.decode_limit_fraction > 0
    assert good.limit_read_gb_s == results.hardware["measured"]["read_bandwidth_gb_s"]["1"]
    assert results.rows[0].limit_gemm_gop_s > 0
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
    assert load_results(folder / "out" / "results.json") == results
    assert not list(Path.cwd().glob("litter"))


def test_finished_rows_are_not_made_or_measured_again(tiny_model, tiny_text, compared, monkeypatch):
    folder, first = compared
    fake = folder / "environments"

    def again(**options):
        return run(tiny_model, tiny_text, folder / "out", "good", "calibrated", environments=fake, **options)

    class Refuses(module.Worker):
        def __init__(self, name, *rest):
            raise AssertionError(f"{name} was started again")

    monkeypatch.setattr(module, "Worker", Refuses)
    monkeypatch.setattr("quern.comparison.measure.Worker", Refuses)
    assert again().rows == first.rows
    with pytest.raises(AssertionError, match="fake-good was started again"):
        again(seed=1)
    record = fake / "fake" / "installed.json"
    content = record.read_text()
    record.write_text(json.dumps({**json.loads(content), "created": "later"}))
    with pytest.raises(AssertionError, match="fake-good was started again"):  # another build may make other bytes
        again()
    record.write_text(json.dumps({**json.loads(content), "versions": {"fake-kernels": "9"}}))
    with pytest.raises(AssertionError, match="started again"):  # or run at another speed
        again()
    record.write_text(content)
    with pytest.raises(AssertionError, match="started again"):
        again(fresh=True)


FAULTS = {
    "hang": ("quantize", "has said nothing for 4 s"),
    "crash": ("quantize", r"SIGSEGV(.|\n)*the last words"),
    "garbage": ("quantize", "which is no answer"),
    "memory": ("quantize", r"used .* GB of memory; its cap is .* GB"),
    "talkative": ("quantize", r"used .* GB of memory; its cap is .* GB"),
    "nothing": ("quantize", "holds no weights"),
    "raise": ("quantize", "groups of 64 do not divide 96"),
    "unloadable": ("load", "no kernel for this processor"),
    "dies": ("measure", "SIGKILL"),
}


def less_patient(quantized):
    """With a tool that hangs; the others may start as slowly as a busy machine lets them."""

    def patient(making, choice, installed, launch):
        silence_s = 4.0 if choice.variant.name == "hang" else launch.silence_s
        return quantized(making, choice, installed, replace(launch, silence_s=silence_s))

    return patient


def test_whatever_a_tool_does_is_the_reason_of_its_row(tiny_model, tiny_text, tmp_path, fake, monkeypatch):
    """One run with every fault: the tool that works and quern's own recipe are measured all the same."""
    monkeypatch.setattr(module, "_quantized", less_patient(module._quantized))
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
        peer_time_limit=120.0,
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


@pytest.fixture
def making(tmp_path):
    """What a comparison in this folder hands to whoever makes an artifact, as far as it is used here."""
    return ArtifactRequest(
        checkpoint=types.SimpleNamespace(path=tmp_path), model_sha256="m", folder=tmp_path, calibration=(), calibration_tokens=512,
        memory=None, threads=1, seed=0, fresh=False, progress=Silent(),
    )  # fmt: skip


def made(making, scratch, fake):
    """The contenders and the failures of the variant that works."""
    return module.make_all(making, module.Tools(scratch, 77.0, fake), peer_variants(["fake:good"]))


def test_an_installation_that_fails_is_a_failed_row(tmp_path, fake, making, monkeypatch):
    (fake / "fake" / "installed.json").unlink()

    def fails(self, command):
        raise PeerError("Fake Tool could not be installed; install.log ends with:\nno such wheel")

    monkeypatch.setattr(lock, "lock_of", lambda name: "")
    monkeypatch.setattr(Environment, "_run", fails)
    contenders, (failure,) = made(making, tmp_path, fake)
    assert contenders == []
    assert (failure.stage, failure.name, failure.tool) == ("install", "fake-good", "Fake Tool")
    assert "no such wheel" in failure.reason


RECORD = {"artifact_sha256": "a", "quantize_seconds": 1.0, "quantize_peak_rss_bytes": 2, "notes": ["its own"]}
"""What lies beside an artifact that is there already."""


def test_an_installed_version_that_the_adapter_does_not_know(tmp_path, fake, making, monkeypatch):
    (fake / "fake" / "installed.json").write_text(json.dumps({**asdict(INSTALLED), "version": "2.1"}))
    monkeypatch.setattr(module, "_quantized", lambda *arguments: RECORD)
    (contender,), failures = made(making, tmp_path, fake)
    assert failures == []
    assert contender.notes[0] == "Fake Tool 2.1 is installed; the adapter is written for >=1,<2"
    assert contender.tool.version == "2.1"


def test_unknown_names(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"unknown peer 'hqqq'; known: .*hqq"):
        compare(tiny_model, tmp_path / "out", peers=["hqqq"])
    with pytest.raises(UserError, match=r"Fake Tool has no variant 'int5'; known: good, "):
        compare(tiny_model, tmp_path / "out", peers=["fake:int5"])
    with pytest.raises(UserError, match="fake-good twice"):
        peer_variants(["fake", "fake:good"])
    assert not (tmp_path / "out").exists()


def test_a_file_is_refused(tiny_model, tiny_text, tmp_path, fake):
    with pytest.raises(UserError, match="fake-good twice"):
        compare(tiny_model, tmp_path / "out", recipes=[], peers=["fake:good", "fake:good"])


def test_the_versions_that_made_a_row_are_noted_also_where_its_artifact_is_reused(tmp_path, fake):
    environment = Environment.of("fake", fake)
    assert environment.versions_note() is None
    versions = {"fake_kernels": "0.3", "torch": "2.13.0", "transformers": "5.23.0", "click": "8"}
    (fake / "fake" / "installed.json").write_text(json.dumps({**asdict(INSTALLED), "versions": versions}))
    assert environment.versions_note() == "fake-tool 1.5 with fake-kernels 0.3, transformers 5.23.0, torch 2.13.0"


def test_an_artifact_that_is_reused_has_the_note_too(tmp_path, fake, making, monkeypatch):
    versions = {"fake-kernels": "0.3"}
    (fake / "fake" / "installed.json").write_text(json.dumps({**asdict(INSTALLED), "versions": versions}))
    monkeypatch.setattr(module, "_quantized", lambda *arguments: RECORD)
    ((contender,), _) = made(making, tmp_path, fake)
    assert contender.notes == ("fake-tool 1.5 with fake-kernels 0.3", "its own")
    assert contender.launch.limit_s == contender.launch.silence_s == 77.0


def fake_tool(scratch, version="1.5", code=""):
    """A tool that the fake adapter can import, installed where its process runs."""
    shutil.rmtree(scratch, ignore_errors=True)
    information = scratch / "fake_tool.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake_tool\nVersion: {version}\n")
    (scratch / "fake_tool.py").write_text(code)
    return scratch


def test_doctor(tmp_path, fake):
    scratch = fake_tool(tmp_path / "scratch")
    health = examine("fake", scratch, fake)
    assert (health.installed, health.healthy, health.problem) == ("1.5", True, None)
    (fake / "fake" / "installed.json").write_text("{")
    assert examine("fake", scratch, fake).healthy is None


def test_doctor_is_not_misled_by_what_a_tool_adds_to_the_path(tmp_path, fake):
    versions = {"vendored": "0.2"}
    (fake / "fake" / "installed.json").write_text(json.dumps({**asdict(INSTALLED), "versions": versions}))
    scratch = fake_tool(
        tmp_path / "scratch", code="import os, sys; sys.path.append(os.path.join(os.getcwd(), 'vendor'))"
    )
    for folder, version in ((scratch, "0.2"), (scratch / "vendor", "0.1")):
        (folder / "vendored.dist-info").mkdir(parents=True)
        (folder / "vendored.dist-info" / "METADATA").write_text(f"Name: vendored\nVersion: {version}\n")
    assert examine("fake", scratch, fake).problem is None


def test_doctor_tells_what_changed_after_the_installation(tmp_path, fake):
    versions = {"Fake_Tool": "1.5", "numpy": "0.1", "fake-kernels": "0.3"}
    (fake / "fake" / "installed.json").write_text(json.dumps({**asdict(INSTALLED), "versions": versions}))
    health = examine("fake", fake_tool(tmp_path / "scratch", "2.1"), fake)
    assert health.healthy is False
    assert health.problem.startswith("Fake Tool 2.1 is installed; the adapter is written for >=1,<2; changed since")
    assert "fake-tool 1.5 is now 2.1, numpy 0.1 is now " in health.problem
    assert "fake-kernels 0.3 is now gone; remove it and install it again" in health.problem


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libfake.so:\\nno such file')", "ImportError: libfake.so: no such file"),
        ("import sys; sys.exit('sets the wrong\\nlast words')", "last words"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
    ],
)
def test_doctor_imports_the_tool(tmp_path, fake, code, said):
    health = examine("fake", fake_tool(tmp_path / "scratch", code=code), fake)
    assert health.healthy is False
    assert said in health.problem
    assert len(health.problem.splitlines()) == 1


def test_doctor_of_an_environment_without_its_python(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(Environment, "command", property(lambda self: [str(self.python)]))
    health = examine("fake", tmp_path, fake)
    assert health.healthy is False
    assert "cannot be started: [Errno 2]" in health.problem


def test_a_tool_that_says_for_ever_that_it_goes_on(tmp_path, fake):
    """Silence is not the only way of taking too long: the limit is on all that it is asked together."""
    np.save(tmp_path / "sequences.npy", np.zeros((1, 4), np.int64))
    variant = asdict(fake_peer.FakePeer().variant("endless"))
    request = {
        "do": "quantize", "model": str(tmp_path), "output": str(tmp_path), "variant": variant, "threads": 1, "seed": 0,
        "sequences": str(tmp_path / "sequences.npy"), "text": "",
    }  # fmt: skip
    advanced = []
    launch = module.launch_of(Environment.of("fake", fake), tmp_path, None, 4.0)
    with module.Worker("fake-endless", launch) as worker, pytest.raises(WorkerError, match=r"longer than the 4 s"):
        worker.ask(request, advanced.append)
    assert advanced


def test_every_tool_is_listed(fake):
    listed = {tool["name"]: tool for tool in known_tools(fake)}
    assert sorted(listed) == PEERS.names()
    assert listed["fake"]["installed"] == "1.5"
    assert {variant["name"] for variant in listed["fake"]["variants"]} == set(fake_peer.BEHAVIOURS)
    assert os.path.isabs(listed["fake"]["folder"])
    assert {"name": "good", "bits": 16, "settings": {"behaviour": "good"}, "calibrated": False, "default": True} in (
        listed["fake"]["variants"]
    )
    for name, tool in listed.items():
        peer = PEERS.get(name)
        assert tool["requirements"] == list(peer.requirements)
        assert tool["also"] == list(peer.also)
        assert tool["modules"] == list(peer.modules)
        assert tool["environment"] == dict(peer.environment)
        assert tool["install"] == f"quern peers install {name}"
        assert [variant["settings"] for variant in tool["variants"]] == [v.settings for v in peer.variants]
    assert json.loads(json.dumps(list(listed.values()))) == list(listed.values())


def test_the_table_shows_devices_and_how_to_install(fake):
    console = Console(file=io.StringIO(), width=200)
    console.print(render_peers.peers(known_tools(fake)))
    lines = console.file.getvalue().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("hqq ")]
    assert "cpu, cuda" in line
    assert "quern peers install NAME" in console.file.getvalue()
