"""Wall time of making an artifact."""

from __future__ import annotations

from quern.evaluation.measures.base import measure

measure(
    name="quantize",
    title="Time to quantize",
    help="Wall time of making the artifact",
    unit="s",
    better="low",
    place=130,
    field="quantize_seconds",
    terminal="nowhere",
)
