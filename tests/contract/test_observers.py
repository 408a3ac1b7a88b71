"""What every observer promises, and what each of the three does."""

import numpy as np
import pytest
import torch

from quern.codecs.base import ScaledParameters
from quern.codecs.integer import IntegerGrid
from quern.observers.base import OBSERVERS
from quern.observers.mean_squared_error import SHRINK
from quern.observers.percentile import TAIL

GRIDS = {
    "symmetric": IntegerGrid(ScaledParameters(bits=4, granularity="channel")),
    "asymmetric": IntegerGrid(ScaledParameters(bits=4, symmetric=False, granularity="channel")),
}


def values(rows: int = 5, columns: int = 4000, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, columns)).astype(np.float32))


@pytest.fixture(params=OBSERVERS.names())
def observer(request):
    return OBSERVERS.get(request.param)()


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


def test_ranges_lie_inside_the_values_and_leave_them_untouched(observer, grid):
    x = values()
    before = x.clone()
    low, high = observer.observe(x, grid.reconstruct)
    assert low.shape == high.shape == (5, 1)
    assert bool((low >= x.amin(1, keepdim=True)).all())
    assert bool((high <= x.amax(1, keepdim=True)).all())
    assert bool((low <= high).all())
    assert torch.equal(x, before)


def test_rows_do_not_know_each_other(observer, grid):
    x = values()
    together = observer.observe(x, grid.reconstruct)
    for row in range(len(x)):
        alone = observer.observe(x[row : row + 1], grid.reconstruct)
        assert torch.equal(together[0][row : row + 1], alone[0])
        assert torch.equal(together[1][row : row + 1], alone[1])


def test_counts_mean_repetition(observer, grid):
    """Small whole counts of values on a coarse grid: every sum is exact, so the ranges are equal and not only close."""
    generator = np.random.default_rng(2)
    x = torch.from_numpy(np.unique(np.round(generator.standard_t(3, 600) * 16))).float()[None]
    counts = torch.from_numpy(generator.integers(1, 40, x.shape[1]))
    repeated = x.repeat_interleave(counts, dim=1)
    by_count = observer.observe(x, grid.reconstruct, counts.float())
    by_repetition = observer.observe(repeated, grid.reconstruct)
    assert torch.equal(by_count[0], by_repetition[0])
    assert torch.equal(by_count[1], by_repetition[1])


def test_values_that_count_nothing_are_ignored(observer, grid):
    x = values(columns=300)
    counts = torch.arange(300).remainder(7).float() + 1
    counts[[0, 17, 150, 299]] = 0
    x[:, [0, 150]] = 1e6
    x[:, [17, 299]] = -1e6
    kept = counts > 0
    with_them = observer.observe(x, grid.reconstruct, counts)
    without = observer.observe(x[:, kept], grid.reconstruct, counts[kept])
    assert torch.equal(with_them[0], without[0])
    assert torch.equal(with_them[1], without[1])


def test_constant_and_single_values(observer, grid):
    for x in (torch.full((2, 9), 0.25), torch.full((2, 9), -3.0), torch.zeros(2, 9), torch.tensor([[2.0], [-7.0]])):
        low, high = observer.observe(x, grid.reconstruct)
        assert bool(torch.isfinite(low).all())
        assert bool(torch.isfinite(high).all())
        assert bool((low <= high).all())


def test_unknown_observer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown observer 'zap'; known: mean_squared_error, min_max, percentile"):
        OBSERVERS.get("zap")


def test_min_max_is_the_extremes():
    x = values()
    low, high = OBSERVERS.get("min_max")().observe(x, GRIDS["symmetric"].reconstruct)
    assert np.array_equal(low.numpy(), x.numpy().min(1, keepdims=True))
    assert np.array_equal(high.numpy(), x.numpy().max(1, keepdims=True))


@pytest.mark.parametrize("columns", [1, 2, 999, 1999, 2001, 50_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_percentile_is_numpys_quantile(columns, weighted):
    x = values(3, columns, seed=columns)
    counts = np.random.default_rng(columns).integers(1, 9, columns).astype(np.float64) if weighted else None
    low, high = OBSERVERS.get("percentile")().observe(
        x, GRIDS["symmetric"].reconstruct, None if counts is None else torch.from_numpy(counts)
    )
    for row in range(3):
        data = x[row].double().numpy()
        assert low[row, 0] == np.quantile(data, TAIL, method="inverted_cdf", weights=counts)
        assert high[row, 0] == -np.quantile(-data, TAIL, method="inverted_cdf", weights=counts)


def squared_error(
    grid: IntegerGrid, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, counts=1.0
) -> torch.Tensor:
    return ((grid.reconstruct(x, low, high) - x).square() * counts).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
def test_mean_squared_error_is_the_best_of_its_candidates(grid, weighted):
    x = values(columns=64)
    counts = torch.linspace(0.1, 5, 64) if weighted else None
    measure = 1.0 if counts is None else counts
    low, high = OBSERVERS.get("mean_squared_error")().observe(x, grid.reconstruct, counts)
    found = squared_error(grid, x, low, high, measure)
    least, most = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    tried = torch.stack([squared_error(grid, x, least * s, most * s, measure) for s in SHRINK])
    assert torch.equal(found, tried.amin(0))
    assert SHRINK[0] == 1.0, "never worse than min_max needs the whole range among the candidates"
    assert bool((found < tried[0]).any()), "heavy tails: some row must gain"
