"""Time from the start of a session to the first token of its answer."""

from __future__ import annotations

from quern.evaluation.measures._passes import over_rounds, time_round
from quern.evaluation.measures.base import measure

measure(
    name="first",
    title="First token",
    help="Time to the first token of an answer; below it the range over the rounds",
    unit="s",
    better="low",
    place=100,
    stage="rounds",
    run=time_round,
    summarize=over_rounds(lambda each: each.time_to_first_token_s, "s"),
    field="time_to_first_token_s",
    heading="time to first token",
    terminal="row",
)
