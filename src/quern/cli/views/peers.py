"""What a person sees of the other tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import table

if TYPE_CHECKING:
    from quern.comparison.tool_process import Health


def peers(tools: Sequence[dict[str, Any]]) -> RenderableType:
    """A line for each tool; variants that its name alone asks for are marked."""
    made = table(("Name", "Installed", "Written for", "Licence", "Devices", "Measured in", "Loads in", "Variants"))
    for tool in tools:
        variants = Text(", ").join(
            Text(variant["name"] + "*" * variant["default"], style="" if variant["default"] else "dim")
            for variant in tool["variants"]
        )
        made.add_row(
            Text(tool["name"], style="bold"),
            Text(tool["installed"] or "no", style="green" if tool["installed"] else "dim"),
            tool["written_for"],
            tool["licence"],
            ", ".join(tool["devices"]),
            tool["runtime"],
            ", ".join(tool["targets"]),
            variants,
        )
    return Group(
        made,
        Text("Install one with `quern peers install NAME`; `quern compare --peers NAME` does it too."),
        Text("NAME alone means its variants with a *, NAME:VARIANT any one; --json shows bits and settings too."),
    )


def health(found: Sequence[Health]) -> RenderableType:
    """A line for each tool: whether it starts, or what is wrong."""
    made = table(("Name", "Installed", "Written for", "State"))
    for one in found:
        if one.healthy is None:
            state = Text("not installed", style="dim")
        elif one.healthy:
            state = Text("starts", style="green")
        else:
            state = Text(one.problem or "does not start", style="red")
        made.add_row(Text(one.name, style="bold"), one.installed or "-", one.written_for, state)
    return made
