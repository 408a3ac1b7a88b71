"""Sketches of inputs: against numpy on the values themselves; what halves of a text say of chance."""

import math

import numpy as np
import pytest
import torch

from quern.quantization.calibration.sketch import (
    BINS,
    FINEST,
    HALVES,
    LOWEST,
    REACH,
    RUNS,
    Sketches,
    differences,
    halves,
    summary,
)


def heavy(tokens: int, columns: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.from_numpy(np.random.default_rng(seed).standard_t(4, (tokens, columns)).astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_sketch_is_numpys_histogram_quantile_and_tail(dtype, scale):
    x = heavy(200, 96, scale=scale).to(dtype)
    sizes = np.abs(x.float().numpy()).ravel()
    found = Sketches.of(x)
    edges = np.array([0.0] + [2.0 ** (LOWEST + k // 8) * (1 + k % 8 / 8) for k in range(1, BINS + 1)])
    assert np.array_equal(found.counts[0].numpy(), np.histogram(sizes, edges)[0])
    assert float(found.greatest) == sizes.max()
    for share in (0.5, 0.9):
        assert float(found.reach(share)) == pytest.approx(np.quantile(sizes, share), rel=0.01)
    # Twenty values decide: they lie anywhere in their bin, which is an eighth of an octave wide.
    assert abs(math.log2(float(found.reach()) / np.quantile(sizes, REACH))) < 1 / 8
    for size in (np.quantile(sizes, 0.9), np.quantile(sizes, 0.99)):
        assert float(found.beyond(size)) == pytest.approx((sizes > size).mean(), rel=0.1)
    assert float(found.beyond(2 * sizes.max())) == 0
    energies = (x.float().double() ** 2).sum(0).numpy()
    runs = [part.sum() for part in np.array_split(energies, RUNS)]
    np.testing.assert_allclose(found.energies[0].numpy(), runs, rtol=1e-5)
    np.testing.assert_allclose(found.profile()[0].numpy(), runs / np.sum(runs), rtol=1e-5)


def test_sketches_add_up_exactly():
    x = heavy(80, 40)
    parts = Sketches.joined([Sketches.of(part) for part in x.split(10)])
    assert torch.equal(parts.summed().counts, Sketches.of(x).counts)
    assert torch.equal(parts.summed().greatest, Sketches.of(x).greatest)
    chosen = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 1]], dtype=torch.float64)
    some = Sketches.of(torch.cat([x[:10], x[30:40], x[70:]]))
    assert torch.equal(parts.summed(chosen).counts, some.counts)
    assert torch.equal(parts.summed(chosen).greatest, some.greatest)


def test_inputs_that_are_odd():
    zero = Sketches.of(torch.zeros(5, 3))
    assert (float(zero.reach()), float(zero.greatest), float(zero.beyond(1e-9))) == (0.0, 0.0, 0.0)
    assert torch.equal(zero.profile(), torch.full((1, RUNS), 1 / RUNS, dtype=torch.float64))
    wild = Sketches.of(torch.tensor([[math.nan, math.inf, -math.inf, 1e-40]]))
    assert bool(wild.reach().isfinite())
    assert int(wild.counts.sum()) == 4
    assert int(Sketches.of(torch.empty(0, 7)).counts.sum()) == 0


def test_differences_are_those_of_the_definitions():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).double(), torch.tensor([[0.25, 0.25, 0.5]]).double()
    one, two = torch.tensor([4.0]).double(), torch.tensor([1.0]).double()
    octaves, distance = differences(one, p, two, q)[0].tolist()
    assert octaves == 2
    assert distance == pytest.approx(math.sqrt(1 - 2 * math.sqrt(0.5 * 0.25)))
    assert differences(two, q, one, p)[0].tolist() == [octaves, distance]
    assert differences(one, p, one, p)[0].tolist() == [0, 0]


def test_halves_are_halves_and_depend_on_the_seed_alone():
    chosen = halves(9, 3)
    assert chosen.shape == (HALVES, 9)
    assert set(chosen.sum(1).tolist()) == {4.0}
    assert torch.equal(chosen, halves(9, 3))
    assert not torch.equal(chosen, halves(9, 4))
    assert halves(8, 3) is None


def test_the_spread_is_what_halves_differ_by_and_the_limit_its_greatest():
    x = heavy(32 * 64, 64).view(32, 64, 64)
    chosen = halves(32, 0)
    kept, limit = summary(["a", "b"], Sketches.joined([Sketches.of(part) for part in x]), chosen, 8.0)
    apart = []
    for row in chosen.bool():
        one, other = Sketches.of(x[row].flatten(0, 1)), Sketches.of(x[~row].flatten(0, 1))
        apart.append(differences(one.reach(), one.profile(), other.reach(), other.profile())[0])
    deviation = torch.stack(apart).square().mean(0).sqrt().clamp(min=FINEST)
    assert kept.spread == pytest.approx(deviation.tolist(), rel=1e-4)
    assert limit == pytest.approx(float((torch.stack(apart) / deviation).max()), rel=1e-6)
    assert kept.clipped == pytest.approx(float((x.abs() > 8).float().mean()), rel=0.1)
    short, none = summary(["a"], Sketches.joined([Sketches.of(part) for part in x[:4]]), halves(4, 0), None)
    assert (short.spread, none, short.clip, short.clipped) == (None, None, None, None)
    assert len(kept.model_dump_json()) < 600
