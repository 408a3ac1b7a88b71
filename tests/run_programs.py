"""quern-run as tests build it, once for all of them, in folders below ``build/`` that later runs find.

Scalar kernels alone, because those of other instruction sets take minutes to compile; all give the same results.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ROOT / "build"
# ld.so refuses ASan where another library is preloaded; nothing it finds may be looked over.
_SANITIZERS = {"ASAN_OPTIONS": "abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    out: bytes
    err: str


@dataclass(frozen=True)
class Program:
    """A built quern-run and what starts it."""

    folder: Path
    before: Sequence[str] = ()

    @property
    def path(self) -> Path:
        return self.folder / "quern-run"

    def run(self, *arguments: object, given: bytes = b"", **variables: str) -> Ended:
        """Start it; signals end as negative codes."""
        command = [*self.before, str(self.path), *map(str, arguments)]
        environment = {**os.environ, **_SANITIZERS, **variables}
        ended = subprocess.run(command, input=given, capture_output=True, env=environment, timeout=300, check=False)
        return Ended(ended.returncode, ended.stdout, ended.stderr.decode("utf-8", "replace"))


def tool(name: str) -> str | None:
    """A program of the environment that runs the tests, or of the machine."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def missing(*tools: str) -> str | None:
    """Which of the programs ``tools`` are not there, as a reason to skip; None where all are."""
    absent = [name for name in tools if tool(name) is None]
    return f"needs {', '.join(absent)}" if absent else None


def build(name: str, *options: str) -> Path:
    """The folder of a build with ``options`` of CMake, up to date; one process at a time builds it."""
    folder = BUILDS / name
    folder.mkdir(parents=True, exist_ok=True)
    cmake = tool("cmake")
    assert cmake is not None
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if tool("ccache") else []
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"] if tool("ninja") else []
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DQUERN_RUN=ON", *generator, *launcher, *options]
        for command in (configure, [cmake, "--build", str(folder), "--target", "quern-run", "--parallel", "2"]):
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return folder
