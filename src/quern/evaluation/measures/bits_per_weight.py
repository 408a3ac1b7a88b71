"""Bits of weight data for each weight of the original model."""

from __future__ import annotations

from quern.evaluation.measures.base import measure

measure(
    name="bits",
    title="Bits per weight",
    help="8 x bytes of weight data / number of weights, counted from the file",
    unit="",
    better="low",
    place=30,
    field="bits_per_weight",
    heading="bits/ weight",
    form=".2f",
)
