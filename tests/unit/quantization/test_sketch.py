"""Sketches of inputs: against numpy on the values themselves; what halves of a text say of chance."""

import math

import numpy as np
import pytest
import torch

from quern.quantization.calibration.sketch import (
    BINS,
    FINEST,
    LOWEST,
    PARTS,
    REACH,
    RUNS,
    Sketches,
    differences,
    halves,
    parts_of,
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


def test_halves_are_all_the_halvings():
    chosen = halves()
    assert chosen.shape == (math.comb(PARTS, PARTS // 2) // 2, PARTS)
    rows = {tuple(row) for row in chosen.tolist()} | {tuple(row) for row in (1 - chosen).tolist()}
    assert len(rows) == math.comb(PARTS, PARTS // 2)
    assert {sum(row) for row in rows} == {PARTS // 2}


def test_parts_are_runs_of_neighbouring_sequences():
    sequences = Sketches.joined([Sketches.of(torch.full((1, 16), 2.0**k)) for k in range(23)])
    parts = parts_of(sequences)
    assert int(parts.counts.sum()) == 23 * 16
    sizes = (parts.counts.sum(1) // 16).tolist()
    assert sum(sizes) == 23
    assert set(sizes) <= {2, 3}
    assert parts.greatest.log2().tolist() == [sum(sizes[: k + 1]) - 1 for k in range(PARTS)]
    assert parts_of(Sketches.joined([Sketches.of(torch.ones(1, 16))] * (PARTS - 1))) is None


def test_the_spread_is_what_halves_differ_by():
    x = heavy(30 * 64, 64).view(30, 64, 64)
    kept = summary(["a", "b"], Sketches.joined([Sketches.of(part) for part in x]), 8.0)
    apart, parts = [], x.view(PARTS, 3, 64, 64)
    for row in halves().bool():
        one, other = Sketches.of(parts[row].flatten(0, 2)), Sketches.of(parts[~row].flatten(0, 2))
        apart.append(differences(one.reach(), one.profile(), other.reach(), other.profile())[0])
    deviation = torch.stack(apart).square().mean(0).sqrt().clamp(min=FINEST)
    assert kept.spread == pytest.approx(deviation.tolist(), rel=1e-4)
    assert kept.clipped == pytest.approx(float((x.abs() > 8).float().mean()), rel=0.1)
    short = summary(["a"], Sketches.joined([Sketches.of(part) for part in x[:9]]), None)
    assert (short.spread, short.clip, short.clipped) == (None, None, None)
    assert len(kept.model_dump_json()) < 600
