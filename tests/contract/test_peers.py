"""What every adapter declares; that its file can be imported where neither the tool nor torch is."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import quern.peers.environment as environment_module
from quern.peers.base import NAME, PEERS, peer_variants
from quern.peers.environment import Environment, Installed, PeerError
from quern.peers.torch_index import cpu_build

RUNTIMES = {"transformers", "vllm", "llama.cpp", "openvino", "onnxruntime", "quern"}


@pytest.fixture(params=PEERS.names())
def name(request):
    return request.param


def test_the_declaration_is_whole(name):
    peer = PEERS.get(name)()
    assert NAME.fullmatch(name)
    assert peer.tool
    assert peer.runtime
    assert peer.licence
    assert peer.homepage.startswith("https://")
    assert set(peer.targets) <= RUNTIMES
    assert peer.targets
    assert "cpu" in peer.devices
    assert peer.modules
    assert peer.package not in peer.also
    assert list(peer.also) == [canonicalize_name(name) for name in peer.also]
    for requirement in peer.requirements:
        Requirement(requirement)


def test_the_required_version_is_one_that_the_adapter_is_written_for(name):
    peer = PEERS.get(name)()
    wanted = [Requirement(text) for text in peer.requirements]
    exact = [r for r in wanted if r.name.lower().replace("_", "-") == peer.package.lower().replace("_", "-")]
    for requirement in exact:
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert pin.version in SpecifierSet(peer.versions)


def test_variants(name):
    peer = PEERS.get(name)()
    names = [variant.name for variant in peer.variants]
    assert len(set(names)) == len(names)
    assert any(variant.default for variant in peer.variants)
    for variant in peer.variants:
        assert NAME.fullmatch(f"{name}-{variant.name}".lower())
        assert 1 <= variant.bits <= 16
    assert [choice.variant for choice in peer_variants([name])] == [v for v in peer.variants if v.default]


def test_adapters_are_importable_without_tools():
    """The registry is read in quern's own process, which has none of the tools, and must stay light."""
    code = (
        "import sys; from quern.peers.base import PEERS; PEERS.names();"
        "print(sorted({'torch', 'transformers', 'hqq', 'gptqmodel', 'openvino'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_boot_finds_quern_from_where_it_lies(tmp_path):
    """In a tool's environment quern is not installed, and its ``__init__`` must not run there."""
    boot = Path(environment_module.BOOT)
    code = (
        "import sys, runpy; sys.argv = ['boot.py', 'no-such-tool']\n"
        f"try:\n    runpy.run_path({str(boot)!r})\n"
        "except Exception as error:\n    print(type(error).__name__, str(error)[:26])\n"
        "print('quern.engines' in sys.modules, hasattr(sys.modules['quern'], 'compare'))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:2] == ["UserError unknown peer 'no-such-tool", "False False"]


class Recorder:
    """Progress that keeps its lines."""

    def __init__(self):
        self.lines = []

    def log(self, message):
        self.lines.append(message)


def test_an_environment_is_made_once_and_recorded_last(tmp_path, monkeypatch):
    commands = []

    def run(self, command):
        commands.append(list(command))

    def record(self):
        assert not (self.folder / "installed.json").exists()
        found = Installed("hqq", "0.2.8", [], "3.11", "now", {})
        import json
        from dataclasses import asdict

        (self.folder / "installed.json").write_text(json.dumps(asdict(found)))
        return found

    monkeypatch.setattr(Environment, "_run", run)
    monkeypatch.setattr(Environment, "_record", record)
    monkeypatch.setattr(environment_module.shutil, "which", lambda name: None)  # no GPU
    environment, progress = Environment.of("hqq", tmp_path), Recorder()
    assert environment.installed() is None
    assert environment.install(progress).version == "0.2.8"
    venv, torch, wheels, sources = commands
    assert venv[1:3] == ["-m", "venv"]
    assert torch[-1] == cpu_build("torch==2.13.0")
    assert "--no-deps" in torch
    for command, file in ((wheels, "wheels.txt"), (sources, "sources.txt")):
        assert {"--no-deps", "--require-hashes"} <= set(command)
        assert command[-1] == str(tmp_path / "hqq" / file)
    assert ("--only-binary" in wheels, "--no-build-isolation" in sources) == (True, True)
    assert "\ntransformers==5.23.0" in (tmp_path / "hqq" / "wheels.txt").read_text()
    assert (tmp_path / "hqq" / "sources.txt").read_text().startswith("hqq==0.2.8 ")
    count = len(commands)
    assert environment.install(progress) == environment.installed()
    assert len(commands) == count
    assert environment.remove()
    assert not environment.remove()
    assert environment.installed() is None


GRANDCHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True); time.sleep(600)"
)


def interrupt_once_written(log):
    """However long the processes take to start."""
    while not (log.is_file() and log.read_text().splitlines()[-1:] and log.read_text().splitlines()[-1].isdigit()):
        time.sleep(0.02)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_installation_that_is_cut_short_leaves_nothing_running(tmp_path, monkeypatch, interrupted):
    """pip and cmake start compilers, which are no children of quern's."""
    environment = Environment.of("hqq", tmp_path)
    environment.folder.mkdir()
    monkeypatch.setattr(environment_module, "INSTALL_LIMIT_S", 600.0 if interrupted else 5.0)
    if interrupted:
        threading.Thread(target=interrupt_once_written, args=[environment.folder / "install.log"]).start()
    with pytest.raises(KeyboardInterrupt if interrupted else PeerError):
        environment._run([sys.executable, "-c", GRANDCHILD])
    grandchild = int((environment.folder / "install.log").read_text().splitlines()[-1])
    deadline = time.monotonic() + 10
    while psutil.pid_exists(grandchild) and psutil.Process(grandchild).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.02)


def test_nothing_of_querns_own_environment_reaches_a_tool(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("VIRTUAL_ENV", "/else")
    variables = Environment.of("hqq", tmp_path).variables()
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(variables)
    assert variables["PATH"].startswith(str(tmp_path / "hqq" / "venv" / "bin"))
    assert variables["HF_HUB_OFFLINE"] == "1"
