"""What a person sees of a plan. No number is computed here."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quern.cli.views.columns import add, number, percent, size
from quern.cli.views.columns import table as plain_table
from quern.core.units import bytes_text, significant

if TYPE_CHECKING:
    from quern.core.allocation import Target
    from quern.pipeline.planning.plan import PlanReport

_UNITS = {"bits": "bits per weight", "max_loss": "nats a token", "min_speed": "tokens/s"}


def plan_report(report: PlanReport) -> RenderableType:
    """Every matrix with its choice, then the sums and what limits them."""
    matrices = plain_table(("matrix", "choice", "bytes", "predicted loss"), right=(2, 3))
    for item in report.matrices:
        rotated = " (rotated)" if item.rotated else ""
        add(matrices, item.name, item.choice + rotated, f"{item.bytes:,}", f"{item.loss:.2e}")
    facts = plain_table(("figure", "value"))
    add(facts, "target", ", ".join(limits(report.target)))
    add(facts, "limited by", report.limit or "nothing: every matrix has the candidate that loses least")
    add(
        facts,
        "size",
        f"{size(report.bytes)} ({report.bytes:,} bytes); the smallest possible: {size(report.smallest_bytes)}",
    )
    add(facts, "smaller by", percent(report.compression))
    add(facts, "bits/weight", number(report.bits_per_weight, ".3f"))
    add(facts, "predicted KL divergence", f"{significant(report.predicted_loss)} nats a token")
    add(facts, "memory", f"{size(report.memory_bytes)} with a cache of {report.context} tokens")
    if report.tokens_per_s is not None:
        add(facts, "decode, at full bandwidth", f"{significant(report.tokens_per_s)} tokens/s")
    notes = [Text(f"note: {note}", style="dim") for note in report.notes]
    return Group(matrices, facts, *notes, Text(_next(report), style="dim"))


def limits(target: Target) -> list[str]:
    """Each limit with its unit."""
    given = target.model_dump()
    return [
        f"{name} {bytes_text(value) if name in ('bytes', 'memory') else f'{value:g}'} {_UNITS.get(name, '')}".rstrip()
        for name, value in given.items()
    ]


def _next(report: PlanReport) -> str:
    if report.path is None:
        return "Write it as a recipe: -o plan.yaml"
    return f"Use it: quern quantize MODEL -o OUT --recipe {shlex.quote(str(report.path))}"
