"""Energy of decoding one token, where the machine counts it."""

from __future__ import annotations

from quern.evaluation.measures._passes import median_joules, time_round
from quern.evaluation.measures.base import measure

measure(
    name="energy",
    title="Energy",
    help="Energy of decoding one token, where the machine counts it",
    unit="J/token",
    better="low",
    place=120,
    stage="rounds",
    run=time_round,
    summarize=median_joules,
    field="energy_joules_per_token",
    heading="energy, J/token",
    terminal="row",
)
