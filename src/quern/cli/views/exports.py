"""What a person sees of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, duration, number, size
from quern.cli.views.columns import table as plain_table
from quern.core.text.language import gettext

if TYPE_CHECKING:
    from quern.pipeline.export import ExportReport


def export_report(report: ExportReport) -> RenderableType:
    """What was written and how large it is."""
    facts = plain_table((gettext("figure"), gettext("value")))
    add(facts, gettext("written to"), str(report.path))
    add(facts, gettext("recipe"), gettext("{recipe}, format {format}", recipe=report.recipe, format=report.format))
    add(facts, gettext("size"), size(report.bytes))
    add(facts, gettext("bits/weight"), number(report.bits_per_weight, ".2f"))
    add(facts, gettext("time"), duration(report.seconds))
    add(facts, gettext("peak RAM"), size(report.peak_rss_bytes))
    return Group(facts, *(Text(gettext("note: {note}", note=note), style="dim") for note in report.notes))
