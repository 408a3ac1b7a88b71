"""Share of multiple-choice items and minimal pairs that are answered correctly."""

from __future__ import annotations

from quern.core import metrics
from quern.core.engine import LoadedModel
from quern.core.results import Figure, Row
from quern.core.text.language import gettext
from quern.evaluation.choice import score_options
from quern.evaluation.measures.base import Given, measure, range_lines


def answer_items(model: LoadedModel, given: Given) -> list[bool]:
    """Whether the model finds the right option most likely, for each item."""
    return score_options(model, given.options, given.advance)


def _figure(raw: list[bool], seed: int) -> Figure:
    return Figure(value=metrics.accuracy(raw), unit="fraction")


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def _difference(row: Row) -> list[str]:
    if row.choice_difference is None:
        return []
    return [
        gettext("{points} points", points=_points(row.choice_difference)),
        *range_lines(row.choice_difference_ci95, _points),
    ]


measure(
    name="choice",
    title="Choice accuracy",
    help="Share of items answered correctly; below it the paired difference to the unquantized model",
    unit="fraction",
    better="high",
    place=70,
    stage="choices",
    run=answer_items,
    summarize=_figure,
    field="choice_accuracy",
    detail=_difference,
    heading="choice",
)
