"""What a person sees of the other tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import table
from quern.core.text.language import gettext

if TYPE_CHECKING:
    from quern.comparison.tool_process import Health


def peers(tools: Sequence[dict[str, Any]]) -> RenderableType:
    """A line for each tool; variants that its name alone asks for are marked."""
    made = table(
        (
            *(gettext("Name"), gettext("Installed"), gettext("Written for"), gettext("Licence"), gettext("Devices")),
            *(gettext("Measured in"), gettext("Loads in"), gettext("Variants")),
        )
    )
    for tool in tools:
        variants = Text(", ").join(
            Text(variant["name"] + "*" * variant["default"], style="" if variant["default"] else "dim")
            for variant in tool["variants"]
        )
        made.add_row(
            Text(tool["name"], style="bold"),
            Text(tool["installed"] or gettext("no"), style="green" if tool["installed"] else "dim"),
            tool["written_for"],
            tool["licence"],
            ", ".join(tool["devices"]),
            tool["runtime"],
            ", ".join(tool["targets"]),
            variants,
        )
    return Group(
        made,
        Text(gettext("Install one with `quern peers install NAME`; `quern compare --peers NAME` does it too.")),
        Text(
            gettext("NAME alone means its variants with a *, NAME:VARIANT any one; --json shows bits and settings too.")
        ),
    )


def health(found: Sequence[Health]) -> RenderableType:
    """A line for each tool: whether it starts, or what is wrong."""
    made = table((gettext("Name"), gettext("Installed"), gettext("Written for"), gettext("State")))
    for one in found:
        if one.healthy is None:
            state = Text(gettext("not installed"), style="dim")
        elif one.healthy:
            state = Text(gettext("starts"), style="green")
        else:
            state = Text(one.problem or gettext("does not start"), style="red")
        made.add_row(Text(one.name, style="bold"), one.installed or "-", one.written_for, state)
    return made
