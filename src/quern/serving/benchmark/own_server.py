"""A server of ours in a process of its own, on a port that is free."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quern.core.errors import QuernError, UserError
from quern.generation.speculation.opening import SpeculationOptions
from quern.loading.fitting import open_model
from quern.serving.server import Served, listen, run

ENDING = 15.0
"""Seconds that it has to end by itself."""


@dataclass(frozen=True)
class OwnServer:
    """A server that was started here."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def own_server(served: Served) -> Iterator[OwnServer]:
    """Serves what ``served`` says until the block ends. Raises ``UserError`` for what cannot be served.

    The socket is opened here, so that the port is known before; it ends with this process, however that ends.
    """
    for path in served.models.values():
        open_model(path)  # what is no model is refused without starting anything
    with contextlib.closing(listen(served.host, served.port)) as listening:
        host, port = listening.getsockname()[:2]
        request = json.dumps({**dataclasses.asdict(served), "models": dict(served.models)})
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listening.fileno()), request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # Ctrl-C is for whoever measures
        )
    try:
        _await_start(process)
        yield OwnServer(f"http://{f'[{host}]' if ':' in host else host}:{port}", process)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _await_start(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise QuernError(f"the server ended with code {process.wait()} before it answered")
    if problem := json.loads(line).get("error"):
        raise UserError(problem)


def _end_with_parent() -> None:
    """The other end of the pipe is closed when whoever started this process is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(descriptor: int, request: str) -> int:
    """In the process of its own."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    started = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(line: str) -> None:
        print(f"note: {line}", file=sys.stderr)

    def say(line: str) -> None:
        if not started.closed:
            with started:
                print(json.dumps({"serving": line}), file=started)

    try:
        given = json.loads(request)
        given["speculation"] = SpeculationOptions(**given["speculation"])
        run(Served(**given), tell, say, socket.socket(fileno=descriptor))
    except QuernError as error:
        if started.closed:
            raise
        with started:
            print(json.dumps({"error": error.message}), file=started)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
