"""The same choice in plain Python: every combination, and a bound that no choice can beat. They judge ``solver.py``."""

from __future__ import annotations

from itertools import product
from math import prod

from quern.quantization.allocation.candidate import Limits, Option, Problem, totals
from quern.quantization.allocation.solver import Goal

MOST_COMBINATIONS = 1_000_000


def solve_exhaustively(problem: Problem, limits: Limits, goal: Goal) -> list[Option] | None:
    """What ``solver.solve`` finds, by trying everything. Raises ``ValueError`` beyond ``MOST_COMBINATIONS``."""
    if prod(len(options) for options in problem) > MOST_COMBINATIONS:
        raise ValueError(f"more than {MOST_COMBINATIONS} combinations")
    allowed = [chosen for chosen in product(*problem) if limits.met_by(chosen)]
    return list(min(allowed, key=lambda chosen: getattr(totals(chosen), goal))) if allowed else None


def least_loss_bound(problem: Problem, most_bytes: int, steps: int = 200) -> float:
    """A loss that no choice of at most ``most_bytes`` goes below: the best Lagrangian bound that bisection finds.

    For every price p >= 0 of a byte, sum over groups of min(loss + p bytes) - p most_bytes is such a bound (Fisher 1981,
    doi:10.1287/mnsc.27.1.1); it is greatest where the cheapest choices change from too many bytes to few enough.
    """
    low, high = 0.0, 1.0
    while _cheapest(problem, high)[1] > most_bytes and high < 1e30:
        high *= 2
    best = _cheapest(problem, 0.0)[0]
    for _ in range(steps):
        price = (low + high) / 2
        value, size = _cheapest(problem, price)
        best = max(best, value - price * most_bytes)
        low, high = (price, high) if size > most_bytes else (low, price)
    return best


def _cheapest(problem: Problem, price: float) -> tuple[float, int]:
    """Loss and priced bytes of the cheapest choice, and its bytes."""
    chosen = [
        min(options, key=lambda option: (option.loss + price * option.bytes, option.bytes)) for options in problem
    ]
    sums = totals(chosen)
    return sums.loss + price * sums.bytes, sums.bytes
