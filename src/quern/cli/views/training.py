"""What a person sees of a training. No number is computed here."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, duration, size
from quern.cli.views.columns import table as plain_table
from quern.core.units import significant

if TYPE_CHECKING:
    from quern.pipeline.train import TrainReport


def train_report(report: TrainReport) -> RenderableType:
    """What was written, and how much nearer to the unquantized model it is."""
    facts = plain_table(("figure", "value"))
    add(facts, "written to", str(report.path))
    add(facts, "recipe", f"{report.recipe.name}, format {report.recipe.format}")
    add(facts, "trained", f"{report.train}, {report.steps} steps on {report.tokens:,} tokens")
    add(facts, "written state", f"that of step {report.best_step}" if report.best_step else "that before training")
    add(facts, "held-out KL before", f"{significant(report.kl_before)} nats a token")
    add(facts, "held-out KL after", f"{significant(report.kl_after)} nats a token")
    add(facts, "size", size(report.bytes))
    add(facts, "time", duration(report.seconds) + (" (resumed)" if report.resumed and report.seconds else ""))
    add(facts, "peak RAM", size(report.peak_rss_bytes))
    notes = [Text(f"note: {note}", style="dim") for note in report.notes]
    hint = Text(f"Measure it: quern evaluate {shlex.quote(str(report.path))} --reference MODEL", style="dim")
    return Group(facts, *notes, hint)
