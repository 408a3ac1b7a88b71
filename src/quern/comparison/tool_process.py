"""The process of another tool in its own environment: how it is started, and whether it starts at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.comparison.worker_process import Launch, Worker
from quern.core.errors import QuernError
from quern.peers.environment import Environment

_DOCTOR_S = 300.0
"""Most seconds that a tool may take to start."""


def launch_of(environment: Environment, scratch: Path, memory: int | None, limit_s: float) -> Launch:
    """How a tool's process is started. All that it is asked together may take ``limit_s``, whether it talks or not."""
    return Launch(
        command=environment.command,
        environment=environment.variables(),
        folder=scratch,
        silence_s=limit_s,
        limit_s=limit_s,
        memory=memory,
    )


@dataclass(frozen=True, kw_only=True)
class Health:
    """What ``quern peers doctor`` found about one tool."""

    name: str
    tool: str
    installed: str | None
    """Version, or None."""
    written_for: str
    healthy: bool | None
    """None where it is not installed."""
    problem: str | None


def examine(name: str, scratch: Path, environments: Path | None = None) -> Health:
    """Whether the tool can be imported, has a version that the adapter is written for, and is as it was installed."""
    environment = Environment.of(name, environments)
    installed = environment.installed()
    peer = environment.peer
    facts: dict[str, Any] = {"name": name, "tool": peer.tool, "written_for": peer.versions}
    if installed is None:
        return Health(**facts, installed=None, healthy=None, problem=None)
    try:
        with Worker(name, launch_of(environment, scratch, None, _DOCTOR_S)) as worker:
            answer = worker.ask({"do": "versions"})
        problem = environment.problem(answer["version"], answer["versions"])
    except QuernError as error:
        problem = _one_line(error)
    return Health(**facts, installed=installed.version, healthy=problem is None, problem=problem)


def _one_line(error: QuernError) -> str:
    """What happened and the last thing that the process wrote, which names the reason."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{first} {others[-1]}" if others else first
