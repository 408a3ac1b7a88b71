"""A server process: models, application, socket."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import uvicorn

from quern.core.errors import UserError, option
from quern.generation.generate import Tell
from quern.generation.speculation.opening import SpeculationOptions
from quern.serving.app import make_app
from quern.serving.connections import ImpatientProtocol
from quern.serving.memory import MemoryLimit
from quern.serving.model import ServedModel
from quern.serving.models import Models
from quern.serving.scheduler import Limits


@dataclass(frozen=True)
class Served:
    """What is to be served, and where."""

    models: Mapping[str, str]
    """Paths by name; the first one is loaded at once and serves requests that name none."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0: any that is free."""
    key: str | None = None
    context: int | None = None
    parallel: int = 8
    waiting: int = 64
    loaded: int | None = None
    memory: int | None = None
    """Bytes of all models in memory, keys and values included; None: what is free."""
    threads: int | None = None
    engine: str = "auto"
    cache: str | None = None
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    pooling: str = "auto"


def run(served: Served, tell: Tell, say: Callable[[str], None], listening: socket.socket | None = None) -> None:
    """Serve until the process is told to end; ``listening``: a socket that listens already, instead of host and port.

    Raises ``UserError`` for a place that is taken and for what is no model.
    """
    if served.speculation.draft is not None and len(served.models) > 1:
        raise UserError(
            f"{option('draft', '--draft')} is for one model, and {len(served.models)} are to be served; serve one, or "
            "leave it out"
        )
    if served.speculation.draft is not None and served.memory is not None:
        raise UserError(
            f"{option('memory', '--memory')} does not count what {option('draft', '--draft')} takes; leave one of them out"
        )
    with closing(listening or listen(served.host, served.port)) as listening:
        _serve(served, listening, tell, say)


def _serve(served: Served, listening: socket.socket, tell: Tell, say: Callable[[str], None]) -> None:
    limits = Limits(parallel=served.parallel, waiting=served.waiting)
    loaders = {
        name: partial(
            ServedModel,
            path,
            name,
            threads=served.threads,
            engine=served.engine,
            cache=served.cache,
            context=served.context,
            limits=limits,
            speculation=served.speculation,
            pooling=served.pooling,
            tell=tell,
        )
        for name, path in served.models.items()
    }
    first = next(iter(loaders))
    loaded = {first: loaders[first]()}  # before the server begins, so that its errors are those of a command
    memory = None if served.memory is None else MemoryLimit(served.memory, served.models, served.parallel)
    if memory is not None:
        memory.take(loaded[first])
    models = Models(
        {name: partial(_taken, loaded, name, load) for name, load in loaders.items()}, served.loaded, memory
    )
    app = make_app(models, served.key)
    host, port = listening.getsockname()[:2]
    say(f"serving {', '.join(served.models)} at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends)")
    if served.key is None and not _loopback(host):
        say("anybody who reaches this address can use it: --api-key KEY answers only those who give the key")
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        log_level="warning",
        timeout_graceful_shutdown=5,
        lifespan="on",
        server_header=False,
    )
    uvicorn.Server(config).run([listening])


def _taken(loaded: dict[str, ServedModel], name: str, load: Callable[[], ServedModel]) -> ServedModel:
    """The model that was loaded before, once; then a new one."""
    return loaded.pop(name, None) or load()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ``UserError``."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another "
            f"{option('port', '--port')}"
        ) from None
    return listening


def _loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")
