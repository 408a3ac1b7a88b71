"""The asking side of ``worker.py``: starts a contender's process, asks it, and always ends it with its children."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import psutil

from quern.core.errors import QuernError, UserError
from quern.core.metrics import NonFiniteError

COMMAND = (sys.executable, "-m", "quern.pipeline.worker")
SILENCE_S = 1800.0
"""A worker that says nothing for so long hangs; the longest silence in honest work is one batch of a large model."""
WAITING_THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For every worker's OpenMP. Threads that spin while they wait for each other are a little faster on an idle machine, but
where other work takes a processor away they spin for whole time slices: decoding was up to fifty times slower."""
_QUIT_S = 5.0
_TAIL = 2000


class WorkerError(QuernError):
    """A contender's process died, hangs, or does not keep to the contract."""


class Worker:
    """A contender's process; a context manager that ends it. ``name`` stands in errors."""

    def __init__(self, name: str, command: Sequence[str] = COMMAND, silence_s: float = SILENCE_S) -> None:
        self.name = name
        self._silence_s = silence_s
        self._killed = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env={**WAITING_THREADS_SLEEP, **os.environ},
        )
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
        """The next answer. Raises ``UserError`` and ``NonFiniteError`` that the worker met, else ``WorkerError``."""
        while True:
            try:
                line = self._lines.get(timeout=self._silence_s)
            except queue.Empty:
                raise self._failed(f"has said nothing for {self._silence_s:g} s") from None
            if line is None:
                raise self._failed("ended")
            answer = self._parse(line)
            if "advance" not in answer:
                break
            advance(answer["advance"])
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
        for descendant in _descendants(self._process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(_QUIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            # A stranger that inherited stdout keeps the listener reading; closing would wait for it.
            if pipe is not None and (pipe is self._process.stdin or not self._listener.is_alive()):
                with contextlib.suppress(OSError):
                    pipe.close()


def _descendants(process_id: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process_id).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _exit_words(code: int | None) -> str:
    if code is None or code >= 0:
        return "it closed its output" if code is None else f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}; the system may have run out of memory" if -code == signal.SIGKILL else name
