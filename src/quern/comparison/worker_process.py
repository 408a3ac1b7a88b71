"""The asking side of a contender's process: starts it, asks it, and always ends it with everything it started.

A process may be one of quern's own engines (``worker.py``) or another tool in its own environment
(``quern.peers.worker``). None of them is trusted to answer, to answer sensibly, to stay within memory or to end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from quern.core.errors import QuernError, UserError
from quern.core.machine.temporary import temporary_file
from quern.core.metrics import NonFiniteError
from quern.core.text.units import bytes_text

COMMAND = (sys.executable, "-m", "quern.comparison.worker")
SILENCE_S = 1800.0
"""A worker that says nothing for so long hangs; the longest silence in honest work is one batch of a large model."""
WAITING_THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For the OpenMP of quern's own workers. Threads that spin while they wait are a little faster on an idle machine, but
where other work takes a processor away they spin for whole time slices: decoding was up to fifty times slower."""
_TAG = "QUERN_WORKER"
"""An environment variable that whatever a worker starts inherits; by it the last of them is found."""
_QUIT_S = 5.0
_LOOK_S = 0.25
"""How often the memory of a process with a limit is looked at."""
_TAIL = 2000


class WorkerError(QuernError):
    """A contender's process died, hangs, or does not keep to the contract."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a contender's process is started and what it may use."""

    command: Sequence[str] = COMMAND
    environment: Mapping[str, str] | None = None
    """All environment variables; None: those of this process."""
    folder: Path | None = None
    """Where it runs; None: here."""
    silence_s: float = SILENCE_S
    """Most seconds without a word from it while it owes an answer."""
    limit_s: float | None = None
    """Most seconds that it may owe answers, all together; None: no limit."""
    memory: int | None = None
    """Most resident bytes of the process and its children together; more ends it."""


OURS = Launch()


def as_other_tools() -> Launch:
    """quern's own worker with threads that wait as other tools' do, which are then compared on equal terms."""
    return Launch(environment=dict(os.environ))


class Worker:
    """A contender's process; a context manager that ends it. ``name`` stands in errors."""

    def __init__(self, name: str, launch: Launch = OURS) -> None:
        self.name = name
        self._launch = launch
        self._killed = False
        self._owed_s = 0.0
        self._looked = time.monotonic()
        self._tag = uuid.uuid4().hex
        self._stderr = temporary_file()
        try:
            self._process = subprocess.Popen(
                launch.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                cwd=launch.folder,
                env={**_environment(launch), _TAG: self._tag},
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError(f"{name}: its process cannot be started: {error}") from None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        self.close()

    @property
    def process_id(self) -> int:
        """Of the worker, which leads its own process group."""
        return self._process.pid

    def send(self, request: dict[str, Any]) -> None:
        """Send a request without waiting; ``receive`` gets its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failed("ended") from None

    def receive(self, advance: Callable[[int], None] = lambda steps: None) -> dict[str, Any]:
        """The next answer.

        Raises ``UserError`` and ``NonFiniteError`` that the worker met, else ``WorkerError``.
        """
        started, limit_s = time.monotonic(), self._launch.limit_s
        end = None if limit_s is None else started + limit_s - self._owed_s
        try:
            answer = self._answer(end, advance)
        finally:
            self._owed_s += time.monotonic() - started
        if answer["ok"]:
            return answer
        message = f"{self.name}: {answer.get('error')}"
        if answer.get("kind") == "non_finite":
            raise NonFiniteError(message)
        if answer.get("kind") == "user":
            raise UserError(message)
        raise self._failed(f"failed: {answer.get('error')}")

    def ask(self, request: dict[str, Any], advance: Callable[[int], None] = lambda steps: None) -> dict[str, Any]:
        """``send`` and ``receive``."""
        self.send(request)
        return self.receive(advance)

    def close(self) -> None:
        """End the process and everything it started; it gets a moment to do so itself."""
        if not self._killed:
            with contextlib.suppress(WorkerError, subprocess.TimeoutExpired):
                self.send({"do": "quit"})
                self._process.wait(_QUIT_S)
        self.kill()
        self._stderr.close()

    def _answer(self, end: float | None, advance: Callable[[int], None]) -> dict[str, Any]:
        while True:
            line = self._line(end)
            if line is None:
                raise self._failed("ended")
            answer = self._parse(line)
            if "advance" not in answer:
                return answer
            advance(answer["advance"])

    def _line(self, end: float | None) -> str | None:
        """The next line; None at the end of the output. Ends a process that is silent, late or too large."""
        silent = time.monotonic() + self._launch.silence_s
        while True:
            self._check_memory()
            if end is not None and time.monotonic() >= end:
                raise self._failed(f"took longer than the {self._launch.limit_s:g} s that it may take")
            due = silent if end is None else min(silent, end)
            wait = max(due - time.monotonic(), 0.0)
            try:
                return self._lines.get(timeout=min(wait, _LOOK_S) if self._launch.memory else wait)
            except queue.Empty:
                pass
            if due == silent and time.monotonic() >= silent:
                raise self._failed(f"has said nothing for {self._launch.silence_s:g} s")

    def _check_memory(self) -> None:
        """By the clock, so that a process which talks all the time is looked at as often as a silent one."""
        if self._launch.memory is None or time.monotonic() < self._looked + _LOOK_S:
            return
        self._looked = time.monotonic()
        used = _resident_bytes(self._process.pid)
        if used > self._launch.memory:
            raise self._failed(f"used {bytes_text(used)} of memory; its cap is {bytes_text(self._launch.memory)}")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _parse(self, line: str) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        steps = answer.get("advance", 0) if isinstance(answer, dict) else None
        if not isinstance(answer, dict) or not isinstance(steps, int) or not ({"advance", "ok"} & set(answer)):
            raise self._failed(f"answered {line[:200]!r}, which is no answer")
        return answer

    def _failed(self, what: str) -> WorkerError:
        """The error that says what happened, after ending the process."""
        if what == "ended":
            what = f"ended unexpectedly ({_exit_words(self._exit_code())})"
        self.kill()
        self._stderr.seek(0)
        tail = self._stderr.read()[-_TAIL:].decode("utf-8", "replace").strip()
        said = f". It last wrote:\n{tail}" if tail else "; it wrote nothing on stderr"
        return WorkerError(f"{self.name}: the process that measures it {what}{said}")

    def _exit_code(self) -> int | None:
        """None if the process lives on although it closed its stdout."""
        try:
            return self._process.wait(_QUIT_S)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process and everything it started at once; whoever waits for an answer gets a ``WorkerError``."""
        if self._killed:
            return
        self._killed = True
        for process in (*_descendants(self._process.pid), *_tagged(self._tag)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(_QUIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            # A stranger that inherited stdout keeps the listener reading; closing would wait for it.
            if pipe is not None and (pipe is self._process.stdin or not self._listener.is_alive()):
                with contextlib.suppress(OSError):
                    pipe.close()


def _environment(launch: Launch) -> Mapping[str, str]:
    """Another tool decides itself how its threads wait."""
    return {**WAITING_THREADS_SLEEP, **os.environ} if launch.environment is None else launch.environment


def _descendants(process_id: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process_id).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _tagged(tag: str) -> list[psutil.Process]:
    """Processes that a worker started, also those whose parent is gone and which have a session of their own."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_TAG) == tag:
                found.append(process)
    return found


def _resident_bytes(process_id: int) -> int:
    """Of a process and its descendants."""
    total = 0
    for process in [process_id, *(child.pid for child in _descendants(process_id))]:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(process).memory_info().rss
    return total


def _exit_words(code: int | None) -> str:
    if code is None or code >= 0:
        return "it closed its output" if code is None else f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}; the system may have run out of memory" if -code == signal.SIGKILL else name
