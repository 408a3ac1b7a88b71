"""exp of the mean negative log-likelihood of the scored tokens."""

from __future__ import annotations

from typing import Any

from quern.core.results import Figure
from quern.evaluation.accuracy import read_scores, text_perplexity
from quern.evaluation.measures._passes import score_text
from quern.evaluation.measures.base import measure


def _figure(raw: list[dict[str, Any]], seed: int) -> Figure:
    return Figure(value=text_perplexity(read_scores(raw)), unit="")


measure(
    name="perplexity",
    title="Perplexity",
    help="exp of the mean negative log-likelihood of the scored text",
    unit="",
    better="low",
    place=50,
    stage="text",
    run=score_text,
    summarize=_figure,
    field="perplexity",
    digits=4,
    heading="per- plexity",
    form=".2f",
)
