"""What a person sees of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, duration, number, size
from quern.cli.views.columns import table as plain_table

if TYPE_CHECKING:
    from quern.pipeline.export import ExportReport


def export_report(report: ExportReport) -> RenderableType:
    """What was written and how large it is."""
    facts = plain_table(("figure", "value"))
    add(facts, "written to", str(report.path))
    add(facts, "recipe", f"{report.recipe}, format {report.format}")
    add(facts, "size", size(report.bytes))
    add(facts, "bits/weight", number(report.bits_per_weight, ".2f"))
    add(facts, "time", duration(report.seconds))
    add(facts, "peak RAM", size(report.peak_rss_bytes))
    return Group(facts, *(Text(f"note: {note}", style="dim") for note in report.notes))
