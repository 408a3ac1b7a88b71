"""The environments that other tools live in: one virtual environment for each, made once, recorded, never shared.

A folder per tool in the cache folder: ``venv/``, ``wheels.txt`` and ``sources.txt`` (the adapter's lock, see
``quern.peers.lock``), ``install.log``, and ``installed.json``, which is written last: an environment without it is
unfinished and is made again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from quern.core.errors import QuernError
from quern.core.progress import Progress
from quern.peers import lock, torch_index
from quern.peers.base import COMMON, LOCKED, PEERS, PIP, TORCH, Peer

if sys.platform != "win32":
    import fcntl

INSTALL_LIMIT_S = 3600.0
"""Most seconds that one command of an installation may take."""
BOOT = Path(__file__).parent / "boot.py"
_EVERYWHERE = ("transformers", "torch")
"""What all environments have, and on whose versions figures depend too."""
_MARKS = ("constraints.txt", "installed.json", "install.log")
"""One of them is in every folder that an environment was made in."""
_CHANGES = 5
"""Changed distributions that a message names."""
_TAIL = 1500
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")


class PeerError(QuernError):
    """Another tool could not be installed or run; the message becomes the reason of its row."""


def cache_folder() -> Path:
    """``quern/peers`` in the user's cache folder (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quern" / "peers"


@dataclass(frozen=True)
class Installed:
    """What ``installed.json`` says."""

    peer: str
    version: str
    requirements: list[str]
    python: str
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Of every distribution in the environment."""


@dataclass(frozen=True)
class Environment:
    """The environment of one peer; it may not exist yet."""

    name: str
    folder: Path

    @classmethod
    def of(cls, name: str, cache: Path | None = None) -> Environment:
        """The environment of the peer called ``name``. Raises ``UserError`` for an unknown one."""
        PEERS.get(name)
        return cls(name, (cache or cache_folder()) / name)

    @property
    def peer(self) -> Peer:
        """Its adapter."""
        return PEERS.get(self.name)()

    @property
    def prefix(self) -> Path:
        """The virtual environment."""
        return self.folder / "venv"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.prefix / "bin" / "python"

    @property
    def command(self) -> list[str]:
        """Starts the adapter's process."""
        return [str(self.python), "-P", "-s", str(BOOT), self.name]

    def variables(self) -> dict[str, str]:
        """Environment variables of the adapter's process: no trace of quern's own environment, no downloads."""
        kept = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
        path = f"{self.prefix / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**kept, "PATH": path, **offline, **self.peer.environment}

    def installed(self) -> Installed | None:
        """What is installed, or None."""
        try:
            return Installed(**json.loads((self.folder / "installed.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def identity(self) -> str:
        """Hash of what was installed and when, and of the adapter's source: what measured figures depend on."""
        adapter = Path(inspect.getfile(type(self.peer))).read_bytes()
        return hashlib.sha256((self.folder / "installed.json").read_bytes() + adapter).hexdigest()[:24]

    def warning(self) -> str | None:
        """What is wrong with the installed version: None if it is one that the adapter is written for."""
        installed = self.installed()
        return None if installed is None else self._unfit(installed.version)

    def _unfit(self, version: str) -> str | None:
        try:
            fits = Version(version) in SpecifierSet(self.peer.versions, prereleases=True)
        except InvalidVersion:
            fits = False
        if fits:
            return None
        return f"{self.peer.tool} {version} is installed; the adapter is written for {self.peer.versions}"

    def problem(self, version: str, versions: Mapping[str, str]) -> str | None:
        """What is wrong with what its process answered, one line, or None.

        ``version`` is the tool's own, ``versions`` those of all distributions. Wrong is a version that the adapter is not
        written for, and everything that is no longer as ``installed.json`` recorded it; what was added is not.
        """
        installed, package = self.installed(), self.peer.package
        recorded = {} if installed is None else _canonical({**installed.versions, package: installed.version})
        now = _canonical({**versions, package: version})
        changed = [
            f"{name} {was} is now {now.get(name, 'gone')}" for name, was in recorded.items() if now.get(name) != was
        ]
        shown = ", ".join(changed[:_CHANGES]) + (f" and {len(changed) - _CHANGES} more" if changed[_CHANGES:] else "")
        again = f"changed since it was installed: {shown}; remove it and install it again" if changed else None
        return "; ".join(filter(None, (self._unfit(version), again))) or None

    def versions_note(self) -> str | None:
        """The versions that a row made and measured in this environment depends on, from ``installed.json``."""
        installed = self.installed()
        if installed is None:
            return None
        known = _canonical(installed.versions)
        beside = [f"{name} {known[name]}" for name in (*self.peer.also, *_EVERYWHERE) if name in known]
        return f"{self.peer.package} {installed.version} with {', '.join(beside)}" if beside else None

    def _check_ours(self) -> None:
        """Raise ``PeerError`` for a folder of somebody else's: it may be named by the caller."""
        marked = any((self.folder / name).is_file() for name in _MARKS)
        if self.folder.exists() and not marked and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise PeerError(f"{self.folder} was not made by quern, so nothing in it is touched. Move it away")

    def install(self, progress: Progress) -> Installed:
        """Make the environment anew, if it is not there and complete. Raises ``PeerError``."""
        self._check_ours()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PeerError(f"{self.peer.tool} could not be installed: {error}") from None
        with _locked(self.folder.parent / f".{self.name}.lock"):
            if (found := self.installed()) is not None:
                return found
            progress.log(f"installing {self.peer.tool} into {self.folder}")
            shutil.rmtree(self.prefix, ignore_errors=True)
            (self.folder / "install.log").unlink(missing_ok=True)
            wheels, sources = self._write_lists()
            self._run([sys.executable, "-m", "venv", str(self.prefix)])
            pip = [str(self.python), *PIP, "install"]
            self._run([*pip, *_torch_options()])
            self._run([*pip, *LOCKED, "--only-binary", ":all:", "-r", str(wheels)])
            self.peer.build(self.prefix, self._run, sources)
            return self._record()

    def remove(self) -> bool:
        """Delete the environment; False if there was none. Raises ``PeerError``."""
        self._check_ours()
        there = self.folder.exists()
        (self.folder / "installed.json").unlink(missing_ok=True)
        shutil.rmtree(self.prefix, ignore_errors=True)  # before what tells that the folder is quern's
        shutil.rmtree(self.folder, ignore_errors=True)
        return there

    def _write_lists(self) -> tuple[Path, Path]:
        """The adapter's lock as two files for pip: what there are wheels of, and what comes as source."""
        try:
            parts = lock.split(lock.lock_of(self.name), self.peer.sources)
        except FileNotFoundError as error:
            raise PeerError(f"{self.peer.tool} has no lock to install from: {error.filename}") from None
        files = (self.folder / "wheels.txt", self.folder / "sources.txt")
        for file, part in zip(files, parts, strict=True):
            file.write_text(part, "utf-8")
        return files

    def _run(self, command: Sequence[str]) -> None:
        """Run one command with its output in ``install.log``. Raises ``PeerError`` if it fails or takes too long."""
        log = self.folder / "install.log"
        with log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            try:
                code = _call(command, output, self.variables(), self.folder)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise PeerError(f"{self.peer.tool} could not be installed: {error}") from None
        if code:
            tail = log.read_bytes()[-_TAIL:].decode("utf-8", "replace").strip()
            raise PeerError(f"{self.peer.tool} could not be installed; {log} ends with:\n{tail}")

    def _record(self) -> Installed:
        listed = subprocess.run(
            [str(self.python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
            capture_output=True,
            text=True,
            env=self.variables(),
            check=True,
        )
        versions = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
        found = Installed(
            peer=self.name,
            version=_version_of(self.peer, versions),
            requirements=[TORCH, *COMMON, *self.peer.requirements],
            python=".".join(map(str, sys.version_info[:3])),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions,
        )
        temporary = self.folder / "installed.json.tmp"
        temporary.write_text(json.dumps(asdict(found), indent=2) + "\n", "utf-8")
        os.replace(temporary, self.folder / "installed.json")
        return found


def _torch_options() -> list[str]:
    """What pip is asked for first: for a GPU PyPI's build with all that it needs, else one without CUDA, and it alone."""
    if shutil.which("nvidia-smi"):
        return [TORCH]
    return [*torch_index.index_options(), "--no-deps", torch_index.cpu_build(TORCH)]


def _call(command: Sequence[str], output: BinaryIO, variables: Mapping[str, str], folder: Path) -> int:
    """Exit code of ``command``. Cut short, by the limit or the keyboard, it ends with all that it started."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=variables,
        cwd=folder,
        start_new_session=True,
    )
    try:
        return process.wait(INSTALL_LIMIT_S)
    except BaseException:
        # Compilers that pip and cmake started would go on for hours; all of them are in the session's one group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _canonical(versions: Mapping[str, str]) -> dict[str, str]:
    """By the one spelling of each distribution's name that all others stand for (PEP 503)."""
    return {str(canonicalize_name(name)): version for name, version in versions.items()}


def _version_of(peer: Peer, versions: Mapping[str, str]) -> str:
    if (version := _canonical(versions).get(canonicalize_name(peer.package))) is not None:
        return version
    raise PeerError(f"{peer.tool} was installed, but its distribution {peer.package} is not there")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two processes never make one environment at once."""
    with path.open("w") as handle:
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
