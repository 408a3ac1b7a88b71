"""Targets that make up for drift, against least squares written out plainly."""

import pytest
import torch
from schemes import gaussian

from quern.core.errors import UserError
from quern.core.machine.parallel import Workers
from quern.quantization.calibration.drift import Drift, Reference
from quern.quantization.drift_targets import shift_of
from quern.quantization.rounding.factor import factorize
from quern.rotation.rotation import pack_signs, rotate

ROWS, COLUMNS, TOKENS, DAMPING = 12, 16, 160, 0.01


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


class Case:
    """A linear behind quantized ones: what it reads and should give, and the plain solution."""

    def __init__(self, noise: float = 0.3, residual: bool = True, held: int = 4) -> None:
        self.weight = gaussian(ROWS, COLUMNS)
        self.unquantized = gaussian(TOKENS, COLUMNS, 1)
        mixed = torch.eye(COLUMNS) + 0.2 * gaussian(COLUMNS, COLUMNS, 2)
        self.own = self.unquantized @ mixed + noise * gaussian(TOKENS, COLUMNS, 3)
        self.added = 0.1 * gaussian(TOKENS, ROWS, 4) if residual else None
        self.weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(5))
        self.held = torch.arange(TOKENS) % held == held - 1

    def drift(self, workers: Workers, signs=None) -> Drift:
        found = Drift(self.weight, torch.zeros(ROWS, COLUMNS))
        for start in range(0, TOKENS, 40):
            some = slice(start, start + 40)
            added = None if self.added is None else self.added[some]
            turned = self.own[some] if signs is None else rotate(self.own[some], signs)
            reference = Reference(self.unquantized[some], added, self.held[some])
            found.add(self.own[some], turned, self.weights[some], reference, workers)
        return found

    def missing(self) -> torch.Tensor:
        """m of every token, float64."""
        found = (self.unquantized - self.own).double() @ self.weight.double().T
        return found if self.added is None else found + self.added.double()

    def hessian(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.T @ (inputs * self.weights[:, None])

    def solution(self) -> torch.Tensor:
        """M (H + damping I)^-1, float64."""
        own, seen = self.own.double(), ~self.held
        hessian = self.hessian(self.own).double()
        damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(COLUMNS)
        wanted = (self.missing()[seen] * self.weights.double()[seen, None]).T @ own[seen]
        return torch.linalg.solve(damped, wanted.T).T


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_shift_is_the_damped_least_squares_solution(order, residual, workers):
    case = Case(residual=residual)
    factor = factorize(case.hessian(case.own), DAMPING, order, workers)
    shift, share = shift_of(case.drift(workers), factor, workers)
    assert 0 < share <= 1
    # float32 sums of 120 terms and two triangular solves of a system of condition below 100.
    assert torch.allclose(shift.double(), share * case.solution(), rtol=1e-3, atol=1e-4)


def test_the_share_is_the_best_for_what_was_left_out(workers):
    case = Case(noise=1.0)
    factor = factorize(case.hessian(case.own), DAMPING, False, workers)
    shift, share = shift_of(case.drift(workers), factor, workers)
    whole, weights = shift.double() / share, case.weights.double()[case.held, None]

    def loss(part: float) -> float:
        left = case.missing()[case.held] - part * (case.own.double()[case.held] @ whole.T)
        return float((weights * left.square()).sum())

    assert loss(share) < loss(0.0), "there it is better than no shift"
    for other in (share - 0.05, min(share + 0.05, 1.0)):
        assert loss(share) <= loss(other) * (1 + 1e-6)


def test_a_shift_that_helps_nobody_is_not_taken(workers):
    """What is missing has nothing to do with the inputs, so that a fit is a fit of noise."""
    case = Case(residual=True)
    case.own = case.unquantized
    case.added = gaussian(TOKENS, ROWS, 9)
    case.added[case.held] = -(case.own[case.held] @ torch.ones(COLUMNS, ROWS))
    case.added[~case.held] = case.own[~case.held] @ torch.ones(COLUMNS, ROWS)
    factor = factorize(case.hessian(case.own), DAMPING, False, workers)
    shift, share = shift_of(case.drift(workers), factor, workers)
    assert share == 0
    assert not shift.any()


def test_where_nothing_drifts_nothing_is_shifted(workers):
    case = Case(noise=0.0, residual=False)
    case.own = case.unquantized
    factor = factorize(case.hessian(case.own), DAMPING, False, workers)
    shift, share = shift_of(case.drift(workers), factor, workers)
    assert share == 0
    assert not shift.any()


def test_rotated_inputs_give_the_rotated_shift(workers):
    case = Case()
    signs = pack_signs((torch.arange(COLUMNS) % 3 == 0).numpy())
    factor = factorize(case.hessian(rotate(case.own, signs)), DAMPING, False, workers)
    shift, share = shift_of(case.drift(workers, signs), factor, workers)
    assert torch.allclose(shift.double(), share * rotate(case.solution().float(), signs).double(), rtol=1e-3, atol=1e-4)


def test_threads_do_not_change_a_byte():
    case, found = Case(), []
    for threads in (1, 2):
        pool = Workers(threads)
        factor = factorize(case.hessian(case.own), DAMPING, False, pool)
        found.append(shift_of(case.drift(pool), factor, pool))
        pool.close()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("where", ["seen", "held"])
def test_values_too_large_for_a_shift_are_refused(where, workers):
    """float32 overflows in M, or in what judges."""
    case = Case(residual=True)
    factor = factorize(case.hessian(case.own), DAMPING, False, workers)
    case.added[case.held if where == "held" else ~case.held] = 3e38
    case.weights[:] = 1e3
    with pytest.raises(UserError, match="what would make up for drift is not finite"):
        shift_of(case.drift(workers), factor, workers)
