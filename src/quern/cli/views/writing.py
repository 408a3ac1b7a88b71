"""What a person sees of a text that a model wrote. No number is computed here."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, duration
from quern.cli.views.columns import table as plain_table
from quern.core.text.language import gettext

if TYPE_CHECKING:
    from quern.pipeline.writing.write_text import WrittenText


def written_text(report: WrittenText) -> RenderableType:
    """What was written, and what it is for."""
    facts = plain_table((gettext("figure"), gettext("value")))
    add(facts, gettext("written to"), str(report.path))
    add(facts, gettext("records"), format(report.records, ","))
    said = gettext(
        "{tokens}, of which the model wrote {own}",
        tokens=format(report.tokens, ","),
        own=format(report.written_tokens, ","),
    )
    add(facts, gettext("tokens"), said)
    add(facts, gettext("time"), duration(report.seconds) + (gettext(" (resumed)") if report.resumed else ""))
    notes = [Text(gettext("note: {note}", note=note), style="dim") for note in report.notes]
    command = f"quern quantize MODEL -o OUT --calibration {shlex.quote(str(report.path))}"
    return Group(facts, *notes, Text(gettext("Calibrate on it: {command}", command=command), style="dim"))
