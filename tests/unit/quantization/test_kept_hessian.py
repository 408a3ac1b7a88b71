"""A Hessian beside its factorization: all of it is there, however its tiles are asked for."""

import pytest
import torch
from schemes import gaussian

from quern.core.machine.parallel import Workers
from quern.quantization.rounding import factor as factors
from quern.quantization.rounding.factor import factorize

COLUMNS = 23


def matrix() -> torch.Tensor:
    mixed = gaussian(COLUMNS, COLUMNS, 1) + 5 * torch.eye(COLUMNS)
    return mixed @ mixed.T


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(factors, "TILE", 5)
    monkeypatch.setattr(factors, "PANEL", 5)


@pytest.mark.parametrize("order", [False, True])
def test_nothing_of_it_is_lost_to_the_factorization(order):
    whole = matrix()
    damped = whole + 0.01 * whole.diagonal().double().mean().float() * torch.eye(COLUMNS)
    found = factorize(whole.triu(), 0.01, order, Workers(1), keep=True)
    kept = found.hessian
    assert kept is not None
    expected = damped.triu() + damped.triu(1).T
    for start, stop in ((0, COLUMNS), (0, 5), (3, 4), (3, 17), (20, 23)):
        assert torch.equal(kept.block(start, stop), expected[start:stop, start:stop])
        right, to = gaussian(stop - start, 7, 2), gaussian(COLUMNS, 7, 3)
        # Sums of at most 23 products in another order: 23 roundings of 2^-24 of the sum of their sizes, twice.
        bound = 2 * 24 * 2**-24 * (to.abs() + expected[:, start:stop].abs() @ right.abs())
        wanted = to + expected[:, start:stop] @ right
        kept.add_product(to, start, stop, right)
        assert bool(((to - wanted).abs() <= bound).all())
    right = gaussian(COLUMNS, 7, 4)
    bound = 2 * 24 * 2**-24 * (expected.abs() @ right.abs())
    assert bool(((kept.product(right) - expected @ right).abs() <= bound).all())
    # And the factorization is that without anything kept.
    alone = factorize(whole.triu(), 0.01, order, Workers(1))
    assert torch.equal(found.upper.triu(1), alone.upper.triu(1))
    assert torch.equal(found.diagonal, alone.diagonal)
