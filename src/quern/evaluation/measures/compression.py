"""How much smaller than the checkpoint in bf16 an artifact is. The report has it below the size."""

from __future__ import annotations

from quern.evaluation.measures.base import measure

measure(
    name="compression",
    title="Compression",
    help="1 - bytes / bytes of the bf16 checkpoint: 0.8 is five times smaller, below 0 is larger",
    unit="fraction",
    better="high",
    place=20,
    field="compression",
    in_report=False,
    heading="smaller by",
)
