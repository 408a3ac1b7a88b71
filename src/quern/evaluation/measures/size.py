"""Bytes on disk of the whole artifact."""

from __future__ import annotations

from quern.core.results import Row
from quern.core.text.language import gettext
from quern.core.text.units import percent_text
from quern.evaluation.measures.base import measure


def _smaller(row: Row) -> list[str]:
    if row.kind == "unquantized":
        return []
    change = percent_text(abs(row.compression))
    return [
        gettext("{change} less", change=change) if row.compression >= 0 else gettext("{change} more", change=change)
    ]


measure(
    name="size",
    title="Size",
    help="Bytes on disk of the whole artifact, and how much smaller that is than the bf16 checkpoint",
    unit="bytes",
    better="low",
    place=10,
    field="bytes",
    detail=_smaller,
    heading="size",
)
