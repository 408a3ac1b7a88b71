"""Whether what came out of rounding is fit for use: tensors and errors in, what is wrong with them out.

The error of a linear is held against those of the same role in the blocks before it. It is out of line where both hold:

- it is ``BIT`` times their median, as if one bit of each code were missing: the error of a grid falls by 6.02 dB with a bit
- its logarithm lies beyond what their spread explains. Spreads are taken of all roles of the same blocks together, because a
  few neighbours do not know theirs: with median m of n neighbours and s = 1.4826 median |x - m| over all residuals,
  (x - m) / (s sqrt(1 + 1/n)) is about Student's t with ``EFFICIENCY`` times as many degrees of freedom as residuals are
  free, since s knows as much as a standard deviation of that share of them. Of all linears of a healthy model one is beyond
  the limit by chance with probability ``FALSE_ALARM`` (Bonferroni). A role whose own spread is greater counts with that.

It is damaged where besides it leaves more than ``DAMAGED`` of the outputs' energy as noise: what the best grid of 2 bits
does to Gaussian weights. Linears of healthy models differ by more than chance, so that being out of line is told, and damage
alone is a reason to stop. ``tests/unit/quantization/test_health.py`` holds both to the errors in ``benchmarks/results``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers, pieces

BIT = 4.0
DAMAGED = 0.1175
"""Max 1960, Quantizing for minimum distortion, table I: four levels."""
NEIGHBOURS = 8
"""Blocks before a linear's own whose errors are its neighbours', at most."""
FEWEST = 3
"""Neighbours without which nothing is said."""
FALSE_ALARM = 0.01
EFFICIENCY = 0.37
"""Of the median absolute deviation of Gaussian numbers (Rousseeuw and Croux 1993, J. Am. Stat. Assoc. 88, page 1273)."""
FLOAT16_GREATEST = 65504.0
ROWS = 1024
"""Rows that one worker looks at."""


@dataclass(frozen=True)
class Standing:
    """How a linear's error stands among its neighbours'."""

    state: Literal["healthy", "out of line", "damaged"]
    usual: float
    """Their median; 0 where there are too few."""


def standing(error: float, role: str, before: Mapping[str, Sequence[float]], comparisons: int) -> Standing:
    """Of a linear's relative ``error``; ``before``: by role the errors in the blocks before it, ``comparisons``: how many
    linears of the model are looked at like that. Raises ``ValueError`` for an error that is no number."""
    if not math.isfinite(error):
        raise ValueError(f"an error of {error} has no standing")
    known = {name: [math.log(one) for one in errors if one > 0] for name, errors in before.items()}
    own = known.get(role, [])
    if error <= 0 or len(own) < FEWEST:
        return Standing("healthy", 0.0)
    from scipy.special import stdtrit  # 0.2 s

    middle = statistics.median(own)
    residuals = {name: _residuals(errors) for name, errors in known.items() if len(errors) >= FEWEST}
    spread = max(_spread([one for some in residuals.values() for one in some]), _spread(residuals[role]))
    free = sum(len(some) - 1 for some in residuals.values())
    beyond = float(stdtrit(EFFICIENCY * free, 1 - FALSE_ALARM / max(comparisons, 1)))
    if math.log(error) - middle <= max(math.log(BIT), beyond * spread * math.sqrt(1 + 1 / len(own))):
        return Standing("healthy", math.exp(middle))
    return Standing("damaged" if error > DAMAGED else "out of line", math.exp(middle))


def _residuals(values: Sequence[float]) -> list[float]:
    """How far each lies from their median, as far as it would if that were not made of them."""
    middle, shrunk = statistics.median(values), math.sqrt(len(values) / (len(values) - 1))
    return [shrunk * abs(one - middle) for one in values]


def _spread(residuals: Sequence[float]) -> float:
    return 1.4826 * statistics.median(residuals)


def count_wrong(values: Tensor, workers: Workers) -> int:
    """How many of ``values`` ``(rows, ...)`` are NaN or infinite."""
    counts = workers.map(
        lambda part: int((~values[part[0] : part[1]].isfinite()).sum()), list(pieces(len(values), ROWS))
    )
    return sum(counts)


def greatest(values: Tensor) -> float:
    """The greatest |x|; NaN where one is."""
    low, high = torch.aminmax(values)
    return float(torch.maximum(low.abs(), high.abs()))
