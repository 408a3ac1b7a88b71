"""Points of ggml's grids: which is nearest, against trying every one, and how they lie in bits."""

from __future__ import annotations

from hashlib import sha256

import pytest
import torch
from torch import Tensor

from quern.codecs.blocks.points import OCTET, TYPES, PointGrid, grid_of
from quern.codecs.packing import bits as dense

CPU = torch.device("cpu")
EIGHT = [name for name, kind in TYPES.items() if kind.width == OCTET]

TABLES = {
    "IQ2_XXS": "05826b5d3e472a3a",
    "IQ2_XS": "06e47aaca60b4dc1",
    "IQ2_S": "e1aa1473412b0552",
    "IQ3_XXS": "46e35f5a997efdee",
    "IQ3_S": "bd1af4945a1717c6",
}
"""The first 8 bytes of the SHA-256 of the points of each type, a byte for each size."""


def unit(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def metric_of(seed: int, near: float = 0.4) -> Tensor:
    """What errors of eight correlated columns cost."""
    mix = torch.eye(OCTET) + near * unit(OCTET, OCTET, seed=seed)
    return mix @ mix.T


def candidates(grid: PointGrid) -> Tensor:
    """Everything that half an octet or a whole one can stand for, whatever the number of negative signs."""
    return (grid.signs[:, None] * grid.points[None]).flatten(0, 1)


def negative(values: Tensor) -> Tensor:
    return (values < 0).sum(-1)


def least_losses(grid: PointGrid, values: Tensor, metric: Tensor) -> Tensor:
    """Of all points with all signs that the type has, by the plain sum."""
    half, all_of_them = grid.kind.width, candidates(grid)
    found = []
    for value in values:
        error = value[:half] - all_of_them
        own = (error @ metric[:half, :half] * error).sum(1)
        if half == OCTET:
            stored = negative(all_of_them) % 2 == 0 if grid.kind.even else torch.ones(len(own), dtype=torch.bool)
            found.append(own[stored].min())
            continue
        other = value[half:] - all_of_them
        rest = (other @ metric[half:, half:] * other).sum(1)
        both = own[:, None] + rest[None] + 2 * (error @ metric[:half, half:]) @ other.T
        if grid.kind.even:
            both[(negative(all_of_them)[:, None] + negative(all_of_them)[None]) % 2 == 1] = torch.inf
        found.append(both.min())
    return torch.stack(found)


def chosen(grid: PointGrid, values: Tensor, metric: Tensor) -> Tensor:
    """What stands for them, and that it can be stored."""
    points, signs = grid.nearest(values, metric)
    found = grid.decode(points, signs)
    assert points.shape == (len(values), OCTET // grid.kind.width)
    assert bool((points >= 0).all())
    assert bool((points < 1 << grid.kind.point_bits).all())
    if grid.kind.even:
        assert not bool((negative(found) % 2).any())
    return found


@pytest.mark.parametrize("name", TYPES)
def test_hardly_anything_that_a_type_has_is_nearer(name):
    """Of eight weights at once 2 % at most; where two points follow each other the first knows the second only as what
    makes up for it, which costs a little more."""
    grid = grid_of(name, CPU)
    values, metric = unit(6, OCTET) * grid.top * 0.4, metric_of(3)
    error = values - chosen(grid, values, metric)
    ours, least = (error @ metric * error).sum(1), least_losses(grid, values, metric)
    assert bool((ours >= least * (1 - 1e-4)).all())
    assert float(ours.sum() / least.sum()) < (1.02 if name in EIGHT else 1.1)


@pytest.mark.parametrize("name", TYPES)
def test_the_metric_is_heeded(name):
    """By a metric far from the identity, what is nearest plainly loses more."""
    grid, metric = grid_of(name, CPU), metric_of(5, near=0.8)
    values = unit(200, OCTET) * grid.top * 0.4
    losses = []
    for by in (metric, torch.eye(OCTET)):
        error = values - chosen(grid, values, by)
        losses.append(float((error @ metric * error).sum()))
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("name", TYPES)
def test_what_a_type_has_stands_for_itself(name):
    grid = grid_of(name, CPU)
    points = torch.arange(1 << grid.kind.point_bits).repeat(OCTET // grid.kind.width).view(-1, OCTET // grid.kind.width)
    signs = torch.arange(len(points)) % 128
    if grid.kind.even:
        signs |= (negative(grid.octet_signs[signs]) % 2) << 7
    values = grid.decode(points, signs)
    assert torch.equal(chosen(grid, values, metric_of(2)), values)
    assert torch.equal(grid.near(values, torch.rand(OCTET) + 0.5), values)


@pytest.mark.parametrize("name", TYPES)
def test_far_and_empty_values_get_finite_points(name):
    grid = grid_of(name, CPU)
    values = torch.stack([torch.zeros(OCTET), torch.full((OCTET,), 1e30), torch.full((OCTET,), -1e30)])
    found = chosen(grid, values, torch.eye(OCTET))
    assert bool((found[0].abs() == grid.points.min()).all())
    longest = grid.points.sum(1).max() * (OCTET // grid.kind.width)
    assert bool((found[1:].abs().sum(1) == longest).all())
    assert bool((found[1] > 0).all())
    assert bool((found[2] < 0).all())


@pytest.mark.parametrize("bits", [15, 16, 18, 23, 26])
def test_wide_codes_come_back(bits):
    codes = torch.randint(0, 1 << bits, (70, 13), generator=torch.Generator().manual_seed(bits))
    words = dense.pack_wide(codes, bits)
    assert words.shape == (70, dense.words_per_row(13, bits))
    assert torch.equal(dense.unpack_wide(words, bits, 13), codes)
    whole = sum(int(code) << place * bits for place, code in enumerate(codes[0]))
    assert [int(word) & 0xFFFFFFFF for word in words[0]] == [
        whole >> 32 * place & 0xFFFFFFFF for place in range(len(words[0]))
    ]


@pytest.mark.parametrize("name", TYPES)
def test_the_tables_are_those_that_artifacts_were_written_with(name):
    """They come from the package ``gguf``, of which there are other versions: files made with other numbers would decode to
    something else."""
    points = grid_of(name, CPU).points
    assert points.shape == (1 << TYPES[name].point_bits, TYPES[name].width)
    assert sha256(points.to(torch.uint8).numpy().tobytes()).hexdigest()[:16] == TABLES[name]
