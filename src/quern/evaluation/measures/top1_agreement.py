"""Share of scored tokens for which the contender and the unquantized model put the same token first."""

from __future__ import annotations

from typing import Any

from quern.core.results import Figure
from quern.evaluation.accuracy import agreement, read_scores
from quern.evaluation.measures._passes import score_text
from quern.evaluation.measures.base import measure


def _figure(raw: list[dict[str, Any]], seed: int) -> Figure | None:
    share = agreement(read_scores(raw))
    return None if share is None else Figure(value=share, unit="fraction")


measure(
    name="top1",
    title="Top-1 agreement",
    help="Share of tokens whose likeliest prediction is the unquantized model's",
    unit="fraction",
    better="high",
    place=60,
    stage="text",
    run=score_text,
    summarize=_figure,
    field="top1_agreement",
    against_reference=True,
    heading="top-1",
)
