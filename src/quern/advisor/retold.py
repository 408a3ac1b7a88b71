"""A stored recommendation in the language that is spoken."""

from __future__ import annotations

from typing import Any

from quern.advisor.recommend import recommend
from quern.core.results import Recommendation, Results
from quern.core.text.language import ENGLISH, english, spoken


def retold(results: Results) -> Recommendation:
    """What ``results`` recommend, its sentences formed again from the rows.

    They stay as they are stored, in English, where that is spoken, and where this version would not say the same of these
    rows: limits that were given are not stored.
    """
    stored = results.recommendation
    if spoken() == ENGLISH or not results.rows:
        return stored
    weights = {str(name): part for name, part in (stored.weights or {}).items()} if stored.scenario == "mix" else None
    with english():
        again = recommend(results.rows, stored.scenario, weights=weights)
    if _said(again) != _said(stored):
        return stored
    return recommend(results.rows, stored.scenario, weights=weights)


def _said(answer: Recommendation) -> dict[str, Any]:
    return answer.model_dump(include={"choice", "reasons", "ranking", "excluded"})
