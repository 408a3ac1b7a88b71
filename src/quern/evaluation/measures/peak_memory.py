"""Memory that running a contender takes: the peak resident set of its process group, loaded and timed."""

from __future__ import annotations

from quern.core.engine import LoadedModel
from quern.core.results import Figure
from quern.evaluation.measures.base import Given, measure
from quern.evaluation.peak_memory import peak_rss_bytes


def read_peak(model: LoadedModel, given: Given) -> int:
    """Bytes that this process and those that it started held resident at most, so far."""
    return peak_rss_bytes()


measure(
    name="memory",
    title="Peak memory",
    help="Largest resident memory of the process group while it ran",
    unit="bytes",
    better="low",
    place=110,
    stage="memory",
    run=read_peak,
    summarize=lambda raw, seed: Figure(value=raw, unit="bytes"),
    field="peak_rss_bytes",
    heading="peak RAM",
)
