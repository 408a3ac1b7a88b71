"""What every observer promises, and what each of them does."""

import numpy as np
import pytest
import torch

from quern.codecs.base import ScaledParameters
from quern.codecs.integer import IntegerGrid
from quern.observers.base import OBSERVERS
from quern.observers.entropy import BINS
from quern.observers.entropy import SHRINK as ENTROPY_SHRINK
from quern.observers.mean_squared_error import SHRINK
from quern.observers.moving_average import DECAY
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
    known = "adaptive, entropy, mean_squared_error, min_max, moving_average, percentile"
    with pytest.raises(ValueError, match=rf"unknown observer 'zap'; known: {known}"):
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


def test_who_follows_batches_stays_among_their_extremes(observer):
    greatest = torch.tensor([3.0, 1.0, 8.0, 2.0], dtype=torch.float64)
    followed = observer.follow(greatest)
    if followed is not None:
        assert 1.0 < float(followed) < 8.0
        assert float(observer.follow(greatest[:1])) == 3.0
        assert torch.allclose(observer.follow(torch.full((40,), 5.0).double()), torch.tensor(5.0).double(), rtol=1e-12)


def test_moving_average_forgets_at_its_rate():
    """Each step multiplies what was by the decay: the recursion of the definition, divided by that of all ones."""
    greatest = np.random.default_rng(4).uniform(1, 9, 30)
    average = weight = 0.0
    for value in greatest:
        average, weight = DECAY * average + (1 - DECAY) * value, DECAY * weight + (1 - DECAY)
    observer = OBSERVERS.get("moving_average")()
    assert float(observer.follow(torch.from_numpy(greatest))) == pytest.approx(average / weight, rel=1e-12)
    x = values()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            observer.observe(x, GRIDS["symmetric"].reconstruct),
            OBSERVERS.get("min_max")().observe(x, GRIDS["symmetric"].reconstruct),
            strict=True,
        )
    )


def divergence(grid: IntegerGrid, row: np.ndarray, weights: np.ndarray, shrink: float) -> float:
    """KL divergence of one row's clipped histogram from what the grid leaves of it, bin by bin in plain Python."""
    low, high = row.min(), row.max()
    width = (high - low) / np.float32(BINS)
    places = np.minimum(np.floor((row - low) / width), BINS - 1)
    mass: dict[float, float] = {}
    for place, weight in zip(places, weights, strict=True):
        mass[place] = mass.get(place, 0.0) + weight
    bins = sorted(mass)
    centres = [float(np.clip(np.float32(low + (np.float32(b) + np.float32(0.5)) * width), low, high)) for b in bins]
    ends = np.float32(low * np.float32(shrink)), np.float32(high * np.float32(shrink))
    inside = [i for i, centre in enumerate(centres) if ends[0] <= centre <= ends[1]]
    kept = {i: mass[bins[i]] for i in inside}
    p = dict(kept)  # what is clipped goes to the outermost bins inside
    p[inside[0]] += sum(mass[bins[i]] for i in range(inside[0]))
    p[inside[-1]] += sum(mass[bins[i]] for i in range(inside[-1] + 1, len(bins)))
    tensor = torch.tensor([[centres[i] for i in inside]])
    codes = grid.reconstruct(tensor, torch.tensor([[ends[0]]]), torch.tensor([[ends[1]]]))[0].tolist()
    total, left = sum(p.values()), sum(kept.values())
    alike: dict[float, list[int]] = {}
    for i, code in zip(inside, codes, strict=True):
        alike.setdefault(code, []).append(i)
    q = {i: sum(kept[j] for j in members) / len(members) / left for members in alike.values() for i in members}
    return sum(p[i] / total * np.log(p[i] / total / q[i]) for i in inside)


@pytest.mark.parametrize("weighted", [False, True])
def test_entropy_is_the_least_divergence_of_its_candidates(grid, weighted):
    x = values(2, 5000)
    counts = torch.from_numpy(np.random.default_rng(5).integers(1, 9, 5000)).float() if weighted else None
    weights = np.ones(5000) if counts is None else counts.numpy().astype(np.float64)
    low, high = OBSERVERS.get("entropy")().observe(x, grid.reconstruct, counts)
    for row in range(2):
        tried = {shrink: divergence(grid, x[row].numpy(), weights, shrink) for shrink in ENTROPY_SHRINK}
        best = min(tried, key=tried.get)
        assert float(high[row]) == pytest.approx(float(x[row].max()) * best, rel=1e-6)
        assert float(low[row]) == pytest.approx(float(x[row].min()) * best, rel=1e-6)
        assert best < 1, "heavy tails: clipping must pay"


@pytest.mark.parametrize("weighted", [False, True])
def test_adaptive_loses_no_more_than_any_other(grid, weighted):
    x = values(8, 64)
    counts = torch.linspace(0.1, 5, 64) if weighted else None
    measure = 1.0 if counts is None else counts
    found = squared_error(grid, x, *OBSERVERS.get("adaptive")().observe(x, grid.reconstruct, counts), measure).double()
    others = {
        name: squared_error(grid, x, *OBSERVERS.get(name)().observe(x, grid.reconstruct, counts), measure).double()
        for name in OBSERVERS.names()
        if name != "adaptive"
    }
    least = torch.stack(list(others.values())).amin(0)
    assert torch.allclose(found, least, rtol=1e-6)
    assert bool((found < others["min_max"]).any())


@pytest.mark.parametrize("counted", [False, True])
def test_few_values_are_observed_as_many_are(counted, monkeypatch):
    """All candidates at once, or one after the other: the same ends to the last bit."""
    few = values(48, 64) * torch.logspace(-3, 2, 48)[:, None]
    few[3] = 0
    counts = values(1, 64, 2)[0].abs().clamp(min=0.1) if counted else None
    for grid in GRIDS.values():
        found = []
        for most in (0, 1 << 14):
            monkeypatch.setattr("quern.observers.mean_squared_error.FEW", most)
            found.append(OBSERVERS.get("mean_squared_error")().observe(few, grid.reconstruct, counts))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
