"""A process that has torch and transformers imported and forks those which measure: they start in no time.

A contender's process spends most of its life on imports, seconds each, and many tests start several. A fork has a process to
itself as one that was started anew: its own memory, process group, environment, folder, standard streams and end
(``tests/unit/comparison/test_warm_workers.py`` holds both against each other). What forks cannot show is that the command of
a worker starts at all; ``test_worker.py`` beside it and ``test_evaluate`` in ``end_to_end/test_command_line.py`` start it.

As a script: the server. A request is one message on the socket that is its stdin: JSON (``words`` after ``python`` on a
command line, ``environment``, ``folder``), with the descriptors of the fork's three standard streams and of a pipe. There the
fork's process id is written, and its exit code when it ends, each in a line.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

IMPORTED = (
    "quern.comparison.worker",
    "quern.peers.worker",
    "quern.peers.transformers_model",
    "quern.architectures.gated_decoder",
    "transformers.masking_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
)
"""What forks need not import."""
MOST = 1 << 20
"""Bytes of a request: an environment may be long."""


class Fork:
    """As much of ``subprocess.Popen`` as whoever starts a worker uses, for text streams and a session of its own."""

    def __init__(self, server: socket.socket, words: Sequence[str], given: Mapping[str, Any]) -> None:
        inside, self.stdin = _pipe(write_here=True)
        outside, self.stdout = _pipe(write_here=False)
        told, telling = os.pipe()
        request = {"words": words, "environment": dict(given["env"]), "folder": str(given["cwd"] or Path.cwd())}
        socket.send_fds(server, [json.dumps(request).encode()], [inside, outside, given["stderr"].fileno(), telling])
        for descriptor in (inside, outside, telling):
            os.close(descriptor)
        self._told = os.fdopen(told, "rb", 0)
        self.returncode: int | None = None
        self.pid = int(self._told.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or the negative number of the signal that ended it."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("fork", timeout or 0)
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode


def _pipe(write_here: bool) -> tuple[int, TextIO]:
    """The other side's end of a pipe, and ours."""
    reading, writing = os.pipe()
    ours, theirs = (writing, reading) if write_here else (reading, writing)
    return theirs, os.fdopen(ours, "w" if write_here else "r", encoding="utf-8", errors="replace")


class Forking:
    """In the place of the module ``subprocess``: what this Python would run is forked, all else is started."""

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """``environment``: of the server, which may find another copy of the package by it; None: this process's."""
        self._environment = os.environ if environment is None else environment
        self._server: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def Popen(self, command: Sequence[str], **given: Any) -> Any:  # noqa: N802 - the module's name for it
        """A process of ``command``."""
        if command[0] != sys.executable or not given["start_new_session"]:
            return subprocess.Popen(command, **given)
        return self._fork(command[1:], given)

    def python(self, folder: Path, *words: str) -> str:
        """What ``python WORDS`` prints in ``folder``, which must succeed."""
        ended = self.ended(folder, *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def ended(self, folder: Path, *words: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """``python WORDS`` in ``folder``, when it has ended; killed if it takes longer."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            fork = self._fork(words, {"env": self._environment, "cwd": folder, "stderr": errors})
            late = threading.Timer(seconds, os.killpg, (fork.pid, signal.SIGKILL))
            late.start()
            fork.stdin.close()
            with fork.stdout as told:
                said = told.read()
            code = fork.wait()
            late.cancel()
            errors.seek(0)
            return subprocess.CompletedProcess(words, code, said, errors.read())

    def _fork(self, words: Sequence[str], given: Mapping[str, Any]) -> Fork:
        if self._server is None:
            self._server = _start(self._environment)
        return Fork(self._server[1], list(words), given)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            process, ours = self._server
            ours.close()
            process.wait(30)


def _start(environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST)
    process = subprocess.Popen([sys.executable, __file__], stdin=theirs, stdout=subprocess.DEVNULL, env=environment)
    theirs.close()
    return process, ours


def serve() -> None:
    """Fork for every request, until nobody can ask any more."""
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    sys.path.remove(str(Path(__file__).parent))
    requests = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MOST, 4)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            _keep(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(request: dict[str, Any], *descriptors: int) -> None:
    """Be the parent of the process that was asked for, and tell how it ends."""
    telling = descriptors[3]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        os.close(telling)
        _be(request, descriptors[:3])
    for descriptor in descriptors[:3]:
        os.close(descriptor)
    with contextlib.suppress(BrokenPipeError):
        os.write(telling, b"%d\n" % process)
        os.write(telling, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    os._exit(0)


def _be(request: dict[str, Any], streams: Sequence[int]) -> None:
    """What ``python WORDS`` does in a new session."""
    os.setsid()
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    # Whether they can seek, among other things, was looked up when they were opened.
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    words, code = request["words"], 0
    place = {"-m": os.getcwd(), "-c": ""}.get(words[0], str(Path(words[0]).parent))
    sys.path[:0] = [place, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
