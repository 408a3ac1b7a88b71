"""What a person sees of a training. No number is computed here."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, duration, size
from quern.cli.views.columns import table as plain_table
from quern.core.text.language import gettext
from quern.core.text.units import significant

if TYPE_CHECKING:
    from quern.pipeline.train import TrainReport


def train_report(report: TrainReport) -> RenderableType:
    """What was written, and how much nearer to the unquantized model it is."""
    facts = plain_table((gettext("figure"), gettext("value")))
    add(facts, gettext("written to"), str(report.path))
    add(
        facts,
        gettext("recipe"),
        gettext("{recipe}, format {format}", recipe=report.recipe.name, format=report.recipe.format),
    )
    add(
        facts,
        gettext("trained"),
        gettext(
            "{what}, {steps} steps on {tokens} tokens",
            what=report.train,
            steps=report.steps,
            tokens=format(report.tokens, ","),
        ),
    )
    add(
        facts,
        gettext("written state"),
        gettext("that of step {step}", step=report.best_step) if report.best_step else gettext("that before training"),
    )
    add(facts, gettext("held-out KL before"), gettext("{loss} nats a token", loss=significant(report.kl_before)))
    add(facts, gettext("held-out KL after"), gettext("{loss} nats a token", loss=significant(report.kl_after)))
    add(facts, gettext("size"), size(report.bytes))
    add(
        facts,
        gettext("time"),
        duration(report.seconds) + (gettext(" (resumed)") if report.resumed and report.seconds else ""),
    )
    add(facts, gettext("peak RAM"), size(report.peak_rss_bytes))
    notes = [Text(gettext("note: {note}", note=note), style="dim") for note in report.notes]
    command = f"quern evaluate {shlex.quote(str(report.path))} --reference MODEL"
    hint = Text(gettext("Measure it: {command}", command=command), style="dim")
    return Group(facts, *notes, hint)
