"""``quern peers``: the other tools that ``quern compare`` can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.text import Text

from quern.cli import options
from quern.cli.terminal.language import Command, Group
from quern.cli.terminal.outcome import say, show, verb, working
from quern.core.errors import UserError
from quern.core.machine.temporary import temporary_folder
from quern.core.text.language import gettext

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Tools, or all.", show_default=False)]


@verb("quern peers list")
def list_peers(json: options.Json = False) -> None:
    """The tools, their variants, and what is installed; --json shows all that is declared, each variant's settings too."""
    from quern.cli.views import peers as render_peers
    from quern.peers.listing import known_tools

    show(known_tools(), json, render_peers.peers)


@verb("quern peers install hqq llama.cpp")
def install(names: Names, json: options.Json = False) -> None:
    """Make the environment of each tool in quern's cache folder; one that is there already stays as it is.

    Exit code 1 if one of them could not be installed.
    """
    from quern.peers.environment import Environment, PeerError

    found: list[dict[str, str | None]] = []
    with working() as progress:
        for name in _known(names):
            try:
                installed = Environment.of(name).install(progress)
                found.append({"name": name, "installed": installed.version, "problem": None})
                progress.log(gettext("{tool} {version} is installed", tool=name, version=installed.version))
            except PeerError as error:
                found.append({"name": name, "installed": None, "problem": error.on_command_line})
    problems = [one["problem"] for one in found if one["problem"]]
    if json:
        show(found, True, str)
    else:
        for problem in problems:
            say(problem, stderr=True)
    if problems:
        raise typer.Exit(1)


@verb("quern peers remove hqq")
def remove(names: Names, json: options.Json = False) -> None:
    """Delete the environments of these tools."""
    from quern.peers.environment import Environment

    found = [{"name": name, "removed": Environment.of(name).remove()} for name in _known(names)]
    show(found, json, lambda _: Text("\n".join(map(_removed, found))))


@verb("quern peers doctor")
def doctor(json: options.Json = False) -> None:
    """Import each installed tool in its environment; compare its version with quern's adapter and the installation.

    Exit code 1 if one of them does not start, or is not what was installed.
    """
    from quern.cli.views import peers as render_peers
    from quern.comparison.tool_process import examine
    from quern.peers.base import PEERS

    with working() as progress, temporary_folder("doctor") as scratch:
        task = progress.task(gettext("starting tools"), len(PEERS.names()))
        found = []
        for name in PEERS.names():
            found.append(examine(name, scratch))
            task.advance()
        task.done()
    show(found, json, render_peers.health)
    if any(health.healthy is False for health in found):
        raise typer.Exit(1)


def _removed(one: dict[str, Any]) -> str:
    if one["removed"]:
        return gettext("{tool}: removed", tool=one["name"])
    return gettext("{tool}: was not installed", tool=one["name"])


def _known(names: list[str]) -> list[str]:
    """The tools meant. Raises ``UserError`` for an unknown one before anything is done."""
    from quern.peers.base import ALL, PEERS

    if ALL in names:
        if len(names) > 1:
            raise UserError(gettext("{all} means every tool; give it alone, or names", all=ALL))
        return PEERS.names()
    for name in names:
        PEERS.get(name)
    return names


app = typer.Typer(
    cls=Group,
    name="peers",
    no_args_is_help=True,
    help="Other quantization tools that `quern compare --peers` runs beside quern, each in an environment of its own.",
)
VERBS: dict[str, Callable[..., Any]] = {"list": list_peers, "install": install, "remove": remove, "doctor": doctor}
for _name, _verb in VERBS.items():
    app.command(_name, cls=Command, epilog=f"Example: {_verb.example}")(_verb)  # type: ignore[attr-defined]
