"""What one token of context takes in the key/value cache."""

from __future__ import annotations

from quern.core.engine import CachingModel, LoadedModel
from quern.core.results import Figure
from quern.evaluation.measures.base import Given, measure


def read_cache(model: LoadedModel, given: Given) -> int | None:
    """Bytes; None for a model that does not say."""
    return model.cache_bytes_per_token if isinstance(model, CachingModel) else None


measure(
    name="cache",
    title="Key/value cache",
    help="Bytes that the keys and values of one token of context take; only quern's cpu engine tells",
    unit="bytes/token",
    better="low",
    place=115,
    stage="memory",
    run=read_cache,
    summarize=lambda raw, seed: None if raw is None else Figure(value=raw, unit="bytes/token"),
    in_report=False,
    heading="cache, bytes/token",
    terminal="row",
    form=",.0f",
)
