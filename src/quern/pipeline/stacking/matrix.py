"""Every ordered pair of parts with its answer, and what trials on a model measured of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from quern.core.recipe import Recipe
from quern.core.results import StackedPair, Stacking
from quern.core.stacking import Answer, Part
from quern.pipeline.stacking.answer import together
from quern.pipeline.stacking.parts import all_parts, parts_of

MEASURED = "measured.json"
"""Written by benchmarks/stacking.py, beside this file."""


@dataclass(frozen=True)
class Measured:
    """What a trial found."""

    kl: float
    """Of the pair, nats a token."""
    bound: float
    """What its parts alone let one expect at most."""


@dataclass(frozen=True)
class Cell:
    """One ordered pair."""

    first: Part
    second: Part
    answer: Answer
    measured: Measured | None
    """None: what is refused, and what nobody has measured."""


@dataclass(frozen=True)
class Matrix:
    """Answers for every ordered pair of some parts."""

    parts: list[Part]
    cells: list[Cell]
    measured_on: dict[str, Any]
    """Model, hardware, date and rules of the trials."""

    def cell(self, first: Part, second: Part) -> Cell:
        """The answer for ``second`` stacked on ``first``."""
        return next(cell for cell in self.cells if (cell.first, cell.second) == (first, second))


def matrix(parts: Collection[Part] | None = None) -> Matrix:
    """The answers for ``parts``; None: all that there are."""
    chosen = [part for part in all_parts() if parts is None or part in parts]
    cells = [cell_of(first, second) for first in chosen for second in chosen if first != second]
    return Matrix(chosen, cells, {key: value for key, value in trials().items() if key != "pairs"})


def cell_of(first: Part, second: Part) -> Cell:
    """The answer for two parts."""
    answer = together(first, second).answer
    known = None if answer.label == "refuses" else trials().get("pairs", {}).get(f"{first}, {second}")
    return Cell(first, second, answer, None if known is None else Measured(known["kl"], known["bound"]))


@cache
def trials() -> dict[str, Any]:
    """What benchmarks/stacking.py measured: facts about it, and ``pairs`` by their names."""
    file = resources.files(__package__).joinpath(MEASURED)
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def stacking_of(recipes: Iterable[Recipe], caches: Iterable[str]) -> Stacking:
    """What of the parts of ``recipes`` can be stacked, on each other, with ``caches`` and in every runtime."""
    parts = {part for recipe in recipes for part in parts_of(recipe)} | {Part("cache", name) for name in caches}
    found = matrix(parts | {part for part in all_parts() if part.kind == "runtime"})
    pairs = [
        StackedPair(first=str(c.first), second=str(c.second), label=c.answer.label, reason=c.answer.reason)
        for c in found.cells
        if c.answer.label != "works"
    ]
    return Stacking(parts=[str(part) for part in found.parts], pairs=pairs)
