"""Runs that several measures share: one pass over the text, one timed round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from quern.core.engine import LoadedModel
from quern.core.metrics import summarize
from quern.core.results import Figure, Row
from quern.core.text.units import limit_text
from quern.evaluation.accuracy import score_windows
from quern.evaluation.measures.base import Given, Summarize, range_lines
from quern.evaluation.speed import SpeedRound, speed_round


def score_text(model: LoadedModel, given: Given) -> list[dict[str, Any]]:
    """Sums over each document, as ``DocumentScore.to_json`` writes them."""
    scores = score_windows(model, given.windows, given.reference, given.advance)
    return [score.to_json() for score in scores]


def time_round(model: LoadedModel, given: Given) -> dict[str, Any]:
    """One prefill and one decode, as ``SpeedRound.to_json`` writes it."""
    return speed_round(model, given.prompt, given.decode_tokens, meter=given.meter).to_json()


def over_rounds(value: Callable[[SpeedRound], float], unit: str) -> Summarize:
    """The median of ``value`` over the rounds, with its range."""

    def figure(raw: Sequence[dict[str, Any]], seed: int) -> Figure:
        found = summarize([value(SpeedRound(**each)) for each in raw])
        return Figure(value=found.median, interval=(found.low, found.high), unit=unit, rounds=found.rounds)

    return figure


def rate_detail(field: str, share: Callable[[Row], float | None]) -> Callable[[Row], list[str]]:
    """Lines below a rate: the range over the rounds, and the share of the machine's limit where there is one."""

    def detail(row: Row) -> list[str]:
        spread, fraction = (row.speed_spread or {}).get(field), share(row)
        lines = range_lines((spread.low, spread.high) if spread else None)
        return lines + ([limit_text(fraction)] if fraction is not None else [])

    return detail


def median_joules(raw: Sequence[dict[str, Any]], seed: int) -> Figure | None:
    """Median energy of decoding one token; None unless every round has one."""
    rounds = [SpeedRound(**each) for each in raw]
    joules = [each.decode_joules / each.decode_tokens for each in rounds if each.decode_joules is not None]
    if not joules or len(joules) < len(rounds):
        return None
    return Figure(value=float(np.median(joules)), unit="J/token")
