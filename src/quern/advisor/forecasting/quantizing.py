"""How long a quantization takes, from operations, weights and rates."""

from __future__ import annotations

from dataclasses import dataclass

from quern.advisor.forecasting.results import Basis, Foretold
from quern.core.text.units import seconds_text, significant


@dataclass(frozen=True)
class Term:
    """One summand."""

    name: str
    seconds: float
    formula: str


def quantize_seconds(terms: list[Term], basis: Basis) -> Foretold:
    """The sum of what each part takes."""
    told = [term for term in terms if term.seconds > 0]
    said = " + ".join(f"{term.name} {seconds_text(term.seconds)} ({term.formula})" for term in told)
    return Foretold(
        value=sum(term.seconds for term in told), unit="seconds", basis=basis, derivation=said or "nothing to do"
    )


def at_rate(name: str, amount: float, rate: float, unit: str) -> Term:
    """``amount`` at ``rate`` a second; nothing where there is none of it."""
    if amount <= 0 or rate <= 0:
        return Term(name, 0.0, "")
    giga = 1e9
    return Term(name, amount / rate, f"{significant(amount / giga)} G{unit} / {significant(rate / giga)} G{unit}/s")
