"""Ranges and locks: every dependency has both ends, and the locks hold what is asked for, with hashes, without CUDA."""

import importlib.metadata
import re
import subprocess
import sys
import threading
import tomllib
import types
from itertools import product
from pathlib import Path

import locked_versions
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_tools import load

from quern.peers import torch_index
from quern.peers.base import BUILD, COMMON, PEERS, TORCH
from quern.peers.lock import LOCKS, lock_of, split

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
RUN = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["build"]
PLACES = [
    {"python_version": python, "python_full_version": f"{python}.4", "platform_machine": machine}
    | {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython"}
    | {"platform_python_implementation": "CPython", "extra": ""}
    for python, machine in product(("3.11", "3.12", "3.13", "3.14"), ("x86_64", "aarch64"))
]
FILES = [*sorted((ROOT / "requirements").glob("*.txt")), *sorted(LOCKS.glob("*.txt"))]
WITH_HASHES = [file for file in FILES if file.name != "torch.txt"]
RENEW = "run make lock"


def extra(name: str) -> list[str]:
    """What an extra asks for, extras of the project that it names included."""
    found = []
    for line in EXTRAS[name]:
        asked = Requirement(line)
        found += [inner for one in asked.extras for inner in extra(one)] if asked.name == "quern" else [line]
    return found


def at(lock: list[Requirement], place: dict[str, str]) -> dict[str, str]:
    """Versions by name that the lock installs at a place."""
    found = {}
    for line in lock:
        if line.marker is None or line.marker.evaluate(place):
            (pin,) = line.specifier
            assert pin.operator == "=="
            assert canonicalize_name(line.name) not in found, f"{line.name} twice"
            found[canonicalize_name(line.name)] = pin.version
    return found


def unmet(wanted: list[str], lock: list[Requirement]) -> list[str]:
    """Requirements that the lock does not satisfy somewhere; torch is not in it."""
    found = []
    for place, requirement in product(PLACES, map(Requirement, wanted)):
        if requirement.name == "torch" or not (requirement.marker is None or requirement.marker.evaluate(place)):
            continue
        version = at(lock, place).get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement}: {version} on Python {place['python_version']}, {place['platform_machine']}")
    return found


def lock(name: str) -> list[Requirement]:
    return locked_versions.pinned(ROOT / "requirements" / name)


@pytest.mark.parametrize("name", ["run.txt", "dev.txt", "lock.txt"])
def test_the_locks_hold_what_pyproject_asks_for(name):
    wanted = {"run.txt": RUN, "dev.txt": RUN + extra("dev"), "lock.txt": PROJECT["dependency-groups"]["lock"]}[name]
    assert unmet(wanted, lock(name)) == [], RENEW


def test_what_is_missing_or_too_old_is_seen():
    known = [Requirement("numpy==2.4.6; python_version < '3.13'"), Requirement("rich==15.0.0")]
    assert unmet(["rich>=14,<16", "torch>=2"], known) == []
    assert len(unmet(["numpy>=2"], known)) == 4
    assert len(unmet(["rich>=16", "gguf>=0.1"], known)) == 16


def test_one_lock_contains_the_other():
    more = {str(line) for line in lock("dev.txt")}
    for place in PLACES:
        assert at(lock("run.txt"), place).items() <= at(lock("dev.txt"), place).items(), RENEW
    assert more


@pytest.mark.parametrize("name", ["run.txt", "dev.txt"])
def test_the_locks_are_complete(name):
    """What each installed distribution of the lock asks for is in the lock too, everywhere; nothing else is installed."""
    known = lock(name)
    for one in [*known, *lock("torch.txt")]:
        try:
            installed = importlib.metadata.distribution(one.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if not one.specifier.contains(installed.version, prereleases=True):
            continue  # another version asks for other things
        asked = [line for line in installed.requires or [] if "extra ==" not in line]
        needed = [line for line in asked if not re.match(r"(nvidia|cuda|triton)", line)]
        assert unmet(needed, known) == [], one.name


@pytest.mark.parametrize("file", WITH_HASHES, ids=lambda file: file.name)
def test_every_line_has_hashes_and_none_brings_cuda(file):
    text = file.read_text("utf-8")
    for line in locked_versions.pinned(file):
        name = canonicalize_name(line.name)
        # nvidia-ml-py is a small reader of what the driver tells.
        assert name == "nvidia-ml-py" or not re.match(r"(torch$|nvidia|cuda|triton)", name)
    entries = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]
    assert entries
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_every_dependency_has_a_lower_and_an_upper_end():
    lines = RUN + [line for name in EXTRAS for line in extra(name)] + PROJECT["build-system"]["requires"]
    for line in [*lines, *PROJECT["dependency-groups"]["lock"]]:
        operators = {one.operator for one in Requirement(line).specifier}
        assert operators == {">=", "<"}, line


def test_build_requirements_agree():
    assert set(PROJECT["build-system"]["requires"]) <= set(PROJECT["dependency-groups"]["build"])


def test_torch_is_one_version_everywhere():
    (pinned,) = lock("torch.txt")
    assert str(pinned) == TORCH
    (range_,) = (Requirement(line) for line in RUN if Requirement(line).name == "torch")
    assert range_.specifier.contains(str(pinned.specifier).removeprefix("=="))


def test_what_the_resolver_is_told_of_torch_is_true():
    told = tomllib.loads((ROOT / "requirements/uv.toml").read_text("utf-8"))["dependency-metadata"]
    (torch,) = (entry for entry in told if entry["name"] == "torch")
    if importlib.metadata.version("torch").split("+")[0] != TORCH.split("==")[1]:
        pytest.skip("another torch is installed")
    real = [line for line in importlib.metadata.requires("torch") or [] if "extra ==" not in line]
    real = [line for line in real if not re.match(r"(nvidia|cuda|triton)", line)]
    assert {str(Requirement(line)) for line in torch["requires-dist"]} == {str(Requirement(line)) for line in real}


@pytest.mark.parametrize("name", PEERS.names())
def test_an_adapters_lock_holds_what_it_names(name):
    peer, known = PEERS.get(name)(), locked_versions.pinned(LOCKS / f"{name}.txt")
    assert unmet([*BUILD, *COMMON, *peer.requirements], known) == [], "run make lock-peers"
    wheels, sources = split(lock_of(name), peer.sources)
    left = set(re.findall(r"^([\w.-]+)==", wheels, re.M))
    taken = set(re.findall(r"^([\w.-]+)==", sources, re.M))
    assert taken == set(peer.sources)
    assert not left & taken
    assert left | taken == {line.name for line in known}
    assert wheels.count("--hash=") + sources.count("--hash=") == lock_of(name).count("--hash=")
    if peer.package in peer.sources:
        assert f"{peer.package}==" in sources


def test_there_is_no_lock_without_an_adapter():
    assert {file.stem for file in LOCKS.glob("*.txt")} == set(PEERS.names())


def test_a_lock_is_split_by_the_names_whatever_their_spelling():
    text = "# made by\nA_b==1 \\\n    --hash=sha256:1\nc==2 ; python_version < '3' \\\n    --hash=sha256:2\n"
    assert split(text, ["a-b"]) == (
        "# made by\nc==2 ; python_version < '3' \\\n    --hash=sha256:2\n",
        "A_b==1 \\\n    --hash=sha256:1\n",
    )


def test_an_index_that_hangs_or_refuses_is_done_without(monkeypatch):
    monkeypatch.setattr(torch_index, "PATIENCE_S", 0.2)
    hangs = threading.Event()

    def hang(*_, **__):
        hangs.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(torch_index.urllib.request, "urlopen", hang)
    assert torch_index.index_options("https://index.invalid") == []
    hangs.set()

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch_index.urllib.request, "urlopen", refuse)
    assert torch_index.index_options("https://index.invalid") == []


def test_pip_is_asked_for_torch_without_cuda(monkeypatch):
    tool = load("tools/install_torch.py")
    monkeypatch.setattr(tool.torch_index, "index_options", lambda: ["--extra-index-url", "https://index.invalid"])
    monkeypatch.setattr(tool.torch_index.sys, "platform", "linux")
    assert tool.pip_command("", "")[-4:] == ["--extra-index-url", "https://index.invalid", "--no-deps", f"{TORCH}+cpu"]
    assert tool.pip_command("", "https://mirror.invalid")[-4:-2] == ["--extra-index-url", "https://mirror.invalid"]
    assert tool.pip_command("torch==2.6.0", "")[-1] == "torch==2.6.0"
    assert "--no-deps" not in tool.pip_command("torch==2.6.0", "")
    monkeypatch.setattr(tool.torch_index.sys, "platform", "darwin")
    assert tool.pip_command("", "")[-1] == TORCH


def test_upper_ends_are_left_out_for_the_newest():
    tool = load("tools/lock.py")
    assert tool.without_upper("numpy>=2.0,<3") == "numpy>=2.0"
    assert tool.without_upper("a[b]>=1,<2; python_version < '3.12'") == 'a[b]>=1; python_version < "3.12"'
    declared = [Requirement(line).name for line in tool.declared()]
    assert "transformers" in declared
    assert "torch" not in declared


def test_versions_that_differ_are_printed(tmp_path, capsys):
    tool = load("tools/lock.py")
    ((numpy, locked),) = [(n, v) for n, v in tool.versions(ROOT / "requirements/dev.txt").items() if n == "numpy"]
    (tmp_path / "other.txt").write_text(
        f"numpy==1.0\n    # via quern\nrich=={tool.versions(ROOT / 'requirements/dev.txt')['rich'].pop()}\n"
    )
    tool.compare(tmp_path / "other.txt")
    told = capsys.readouterr().out
    assert told.startswith("1 of 2 distributions")
    assert f"{numpy} {locked.pop()} -> 1.0" in told


WARNS = "import warnings\ndef test_it():\n    warnings.warn('soon gone', FutureWarning)\n"


@pytest.mark.parametrize("unlocked", [[], ["rich 99 (locked: ==15.0.0)"]], ids=["locked", "other versions"])
def test_warnings_are_errors_in_the_locked_versions_only(tmp_path, unlocked):
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (tmp_path / "test_it.py").write_text(WARNS)
    (tmp_path / "locked_versions.py").write_text(f"def departures(): return {unlocked!r}\n")
    (tmp_path / "tiny_model.py").write_text("calibration_text = write_model = None\n")
    (tmp_path / "warm_workers.py").write_text("Forking = Subprocess = None\n")
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text("utf-8"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == (0 if unlocked else 1), ended.stdout
    assert "soon gone" in ended.stdout
    assert ("rich 99" in ended.stdout) == bool(unlocked)


def test_another_version_or_python_is_a_departure(monkeypatch):
    installed = types.SimpleNamespace(name="NumPy", version="1.0")
    monkeypatch.setattr(locked_versions.importlib.metadata, "distributions", lambda: [installed])
    monkeypatch.setattr(locked_versions.sys, "version_info", (3, 11, 9))
    (found,) = locked_versions.departures()
    assert re.match(r"numpy 1\.0 \(locked: ==\d", found)
    monkeypatch.setattr(locked_versions.sys, "version_info", (3, 13, 0))
    assert locked_versions.departures() == ["Python 3.13", found]
