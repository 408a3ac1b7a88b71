"""The choice itself: a multiple-choice knapsack, solved as an integer program by SciPy's HiGHS.

One binary variable for each option of each group, exactly one of a group is 1 (Sinha and Zoltners 1979,
doi:10.1287/opre.27.3.503). Either the loss becomes least within limits of bytes, or bytes become few within a limit of
the loss. ``reference.py`` judges it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quern.quantization.allocation.candidate import Limits, Option, Problem, useful

Goal = Literal["loss", "bytes"]
GAP = 1e-5
"""Relative distance from the optimum at which the search may end: losses are not known so well."""
NODES = 100_000
"""Nodes of the search tree, a limit that does not depend on the machine's speed."""
_TOLERANCE = 1e-6
"""Relative violation of a limit that HiGHS allows itself; limits that were violated are tried again so much lower."""
_TRIES = 4


def solve(problem: Problem, limits: Limits, goal: Goal) -> list[Option] | None:
    """One option of each group, so that ``goal`` becomes least within ``limits``; None where nothing keeps them.

    Limits are kept exactly, however the solver rounds. The same problem has the same answer on every run.
    """
    groups = [useful(options) for options in problem]
    for attempt in range(_TRIES):
        chosen = _milp(groups, limits, goal, 1 - attempt * 2 * _TOLERANCE)
        if chosen is None or limits.met_by(chosen):
            return chosen
    return None


def _milp(groups: Sequence[Sequence[Option]], limits: Limits, goal: Goal, share: float) -> list[Option] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [option for group in groups for option in group]
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    columns = np.arange(len(options))
    one_of_each = csr_array((np.ones(len(options)), (group_of, columns)), shape=(len(groups), len(options)))
    constraints = [LinearConstraint(one_of_each, 1, 1)]
    for name in ("bytes", "read", "loss"):
        most = getattr(limits, name)
        if most is not None:
            # In units of the limit, so that all rows have numbers of one size.
            row = _values(options, name) / most
            constraints.append(LinearConstraint(row[None], -np.inf, share))
    cost = _values(options, goal)
    least = sum(min(getattr(option, goal) for option in group) for group in groups)
    answer = milp(
        cost / max(least, float(cost.max()) * _TOLERANCE, np.finfo(float).tiny),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if answer.x is None:
        return None
    chosen = [options[int(place)] for place in _largest_of_each(answer.x, group_of, len(groups))]
    return chosen


def _values(options: Sequence[Option], name: str) -> NDArray[np.float64]:
    return np.array([getattr(option, name) for option in options], dtype=np.float64)


def _largest_of_each(values: NDArray[np.float64], group_of: NDArray[np.int64], groups: int) -> list[int]:
    """Of each group the place of its largest value, the first of equal ones."""
    return [int(np.flatnonzero(group_of == group)[values[group_of == group].argmax()]) for group in range(groups)]
