"""What a person sees of a plan. No number is computed here."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, number, percent, size
from quern.cli.views.columns import table as plain_table
from quern.core.text.language import gettext, pgettext, translatable
from quern.core.text.units import bytes_text, significant

if TYPE_CHECKING:
    from quern.core.allocation import Target
    from quern.pipeline.planning.plan import PlanReport

_UNITS = {"bits": translatable("bits per weight"), "max_loss": translatable("nats a token"), "min_speed": "tokens/s"}


def plan_report(report: PlanReport) -> RenderableType:
    """Every matrix with its choice, then the sums and what limits them."""
    matrices = plain_table(
        (gettext("matrix"), pgettext("of a recipe", "choice"), gettext("bytes"), gettext("predicted loss")),
        right=(2, 3),
    )
    for item in report.matrices:
        rotated = gettext(" (rotated)") if item.rotated else ""
        add(matrices, item.name, item.choice + rotated, f"{item.bytes:,}", f"{item.loss:.2e}")
    facts = plain_table((gettext("figure"), gettext("value")))
    add(facts, gettext("target"), gettext(", ").join(limits(report.target)))
    add(facts, gettext("limited by"), limiting(report.limit))
    sizes = gettext(
        "{size} ({bytes} bytes); the smallest possible: {smallest}",
        size=size(report.bytes),
        bytes=format(report.bytes, ","),
        smallest=size(report.smallest_bytes),
    )
    add(facts, gettext("size"), sizes)
    add(facts, gettext("smaller by"), percent(report.compression))
    add(facts, gettext("bits/weight"), number(report.bits_per_weight, ".3f"))
    add(
        facts,
        gettext("predicted KL divergence"),
        gettext("{loss} nats a token", loss=significant(report.predicted_loss)),
    )
    add(
        facts,
        gettext("memory"),
        gettext("{size} with a cache of {tokens} tokens", size=size(report.memory_bytes), tokens=report.context),
    )
    if report.tokens_per_s is not None:
        add(facts, gettext("decode, at full bandwidth"), f"{significant(report.tokens_per_s)} tokens/s")
    notes = [Text(gettext("note: {note}", note=note), style="dim") for note in report.notes]
    return Group(matrices, facts, *notes, Text(_next(report), style="dim"))


def limits(target: Target) -> list[str]:
    """Each limit with its unit."""
    told = []
    for name, value in target.model_dump().items():
        figure = bytes_text(value) if name in ("bytes", "memory") else f"{value:g}"
        told.append(f"{name} {figure} {gettext(_UNITS.get(name, ''))}".rstrip())
    return told


def limiting(limit: str | None) -> str:
    """Which of them limits the plan."""
    return limit or gettext("nothing: every matrix has the candidate that loses least")


def _next(report: PlanReport) -> str:
    if report.path is None:
        return gettext("Write it as a recipe: {command}", command="-o plan.yaml")
    command = f"quern quantize MODEL -o OUT --recipe {shlex.quote(str(report.path))}"
    return gettext("Use it: {command}", command=command)
