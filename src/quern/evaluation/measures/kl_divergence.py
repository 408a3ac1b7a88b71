"""Accuracy loss: mean KL divergence from the unquantized model's predictions, over the scored tokens."""

from __future__ import annotations

from typing import Any

from quern.core.results import Figure
from quern.evaluation.accuracy import mean_divergence, read_scores
from quern.evaluation.measures._passes import score_text
from quern.evaluation.measures.base import measure


def _figure(raw: list[dict[str, Any]], seed: int) -> Figure | None:
    estimate = mean_divergence(read_scores(raw), seed=seed)
    return None if estimate is None else Figure(value=estimate.mean, interval=estimate.interval, unit="nats/token")


measure(
    name="kl",
    title="KL divergence",
    help="Mean KL divergence from the unquantized model's predictions, with its 95 % interval",
    unit="nats/token",
    better="low",
    place=40,
    stage="text",
    run=score_text,
    summarize=_figure,
    field="kl_mean",
    interval_field="kl_ci95",
    against_reference=True,
    heading="KL diver- gence",
    form=".4f",
    interval_heading="95 % interval",
)
