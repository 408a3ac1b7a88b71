"""The allocator's integer program against every combination and against a bound, on seeded instances."""

import dataclasses

import numpy as np
import pytest

from quern.core.errors import UserError
from quern.core.plan import LinearPlan
from quern.core.scheme import parse_scheme
from quern.quantization.allocation.candidate import Candidate, Limits, Option, grouped, totals, useful
from quern.quantization.allocation.reference import least_loss_bound, solve_exhaustively
from quern.quantization.allocation.solver import GAP, solve

BITS = (2, 3, 4, 8)


def plan(bits: int) -> LinearPlan:
    return LinearPlan(parse_scheme({"bits": bits}))


def candidates(random: np.random.Generator, name: str, size: int) -> list[Candidate]:
    """As quantization has them: four times fewer losses for every bit, give or take, in units of KL."""
    scale = 10.0 ** random.uniform(-7, -2)
    return [Candidate(name, plan(b), size * b, scale * 4.0**-b * float(random.uniform(0.5, 2))) for b in BITS]


def instance(seed: int, groups: int, unread: int = 0) -> list[list[Option]]:
    random = np.random.default_rng(seed)
    found = []
    for number in range(groups):
        size = int(random.choice([64, 100, 1000, 3333]))
        hidden = {str(number)} if number < unread else set()
        found.append([Option.of([one], hidden) for one in candidates(random, str(number), size)])
    return found


def between(problem: list[list[Option]], share: float, name: str) -> float:
    low, high = (sum(f(getattr(o, name) for o in group) for group in problem) for f in (min, max))
    return low + share * (high - low)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("goal", ["loss", "bytes"])
def test_it_is_the_best_of_all_combinations(seed, goal):
    """Up to the gap at which the search may end. Every kind of limit takes part in some of the cases."""
    problem = instance(seed, 6, unread=seed % 3)
    share = 0.15 + 0.06 * seed
    limits = Limits(
        bytes=int(between(problem, share, "bytes")) if goal == "loss" or seed % 2 else None,
        read=int(between(problem, share * 0.9, "read")) if seed % 4 == 1 else None,
        loss=between(problem, 0.4 * (1 - share), "loss") if goal == "bytes" else None,
    )
    ours, best = solve(problem, limits, goal), solve_exhaustively(problem, limits, goal)
    assert (ours is None) == (best is None)
    if best is not None:
        assert limits.met_by(ours)
        assert getattr(totals(ours), goal) <= getattr(totals(best), goal) * (1 + GAP)


def test_the_cases_above_have_answers_and_none():
    found = [
        solve_exhaustively(instance(s, 6), Limits(bytes=int(between(instance(s, 6), 0.3, "bytes"))), "loss")
        for s in range(3)
    ]
    assert all(found)
    problem = instance(0, 6)
    assert solve(problem, Limits(bytes=int(between(problem, 0, "bytes")) - 1), "loss") is None
    assert solve(problem, Limits(loss=between(problem, 0, "loss") * 0.999), "bytes") is None


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_model_comes_near_the_bound_and_keeps_the_limit(seed):
    """560 linears of a 72B model's sizes: no choice is below the bound, and the best is not far above, since the bound is off by
    less than one linear's gain."""
    random = np.random.default_rng(seed)
    problem = [
        [Option.of([one]) for one in candidates(random, str(n), int(random.choice([2**23, 2**26, 3 * 2**26])))]
        for n in range(560)
    ]
    most = int(between(problem, 0.2, "bytes"))
    chosen = solve(problem, Limits(bytes=most), "loss")
    assert chosen is not None
    sums, bound = totals(chosen), least_loss_bound(problem, most)
    assert most * 0.995 <= sums.bytes <= most
    assert bound * (1 - 1e-9) <= sums.loss <= bound * 1.005
    again = solve(problem, Limits(bytes=most), "loss")
    assert [one.bytes for one in again] == [one.bytes for one in chosen]


def test_the_bound_is_one():
    for seed in range(5):
        problem = instance(seed, 6)
        most = int(between(problem, 0.3, "bytes"))
        best = totals(solve_exhaustively(problem, Limits(bytes=most), "loss")).loss
        bound = least_loss_bound(problem, most)
        assert 0 < bound <= best * (1 + 1e-9)
        assert bound > 0.3 * best, "a bound of nothing judges nobody"


def test_what_is_larger_and_loses_more_is_never_chosen():
    small, good = Option((), 10, 10, 1.0), Option((), 20, 20, 0.1)
    worse, same = Option((), 21, 21, 0.1), Option((), 10, 10, 1.5)
    unread = Option((), 30, 5, 1.2)
    assert useful([worse, good, same, small]) == [small, good]
    assert useful([unread, good, small]) == [small, good, unread], "a token reads less of it"


def test_matrices_that_belong_together_get_one_scheme():
    random = np.random.default_rng(3)
    each = {name: candidates(random, name, 100) for name in ("q", "k", "v", "o")}
    problem = grouped(each, [("q", "k", "v")])
    assert [len(group) for group in problem] == [4, 4]
    for option in problem[0]:
        assert len({one.plan for one in option.candidates}) == 1
        assert [one.linear for one in option.candidates] == ["q", "k", "v"]
        assert option.bytes == sum(one.bytes for one in option.candidates)
        assert option.loss == pytest.approx(sum(one.loss for one in option.candidates))
    each["v"] = [dataclasses.replace(each["v"][0], plan=plan(5))]
    with pytest.raises(UserError, match="q, k, v are to get one scheme"):
        grouped(each, [("q", "k", "v")])
    assert len(grouped(each, [])) == 4


def test_too_much_to_try():
    with pytest.raises(ValueError, match="combinations"):
        solve_exhaustively(instance(0, 20), Limits(), "loss")
