"""Memory that making an artifact took. The report has it beside other tools, whose needs differ."""

from __future__ import annotations

from quern.evaluation.measures.base import measure

measure(
    name="quantize_memory",
    title="Memory to quantize",
    help="Largest resident memory of the process group while it made the artifact",
    unit="bytes",
    better="low",
    place=140,
    field="quantize_peak_rss_bytes",
    terminal="nowhere",
    only_beside_other_tools=True,
)
