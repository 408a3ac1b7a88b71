"""Fitted codebooks: as good as the best there are, weighted as asked, and whole where the weights are few or all the same."""

import numpy as np
import pytest
import torch
from schemes import make_codec

from quern.codecs.fitting.lloyd import fit_tables

BEST_OF_A_NORMAL = {4: 0.1175, 8: 0.03454, 16: 0.009497}
"""Mean squared error of the best 4, 8 and 16 values on a unit Gaussian (Max 1960, table I)."""


def best_by_search(values: np.ndarray, weight: np.ndarray, count: int) -> float:
    """The least weighted squared error of ``count`` cells of sorted ``values``, by dynamic programming."""
    order = np.argsort(values)
    x, w = values[order], weight[order]
    mass, first, second = (np.concatenate([[0], np.cumsum(part)]) for part in (w, w * x, w * x * x))

    def cost(start: int, stop: int) -> float:
        m = mass[stop] - mass[start]
        s = first[stop] - first[start]
        return second[stop] - second[start] - (s * s / m if m > 0 else 0)

    best = [cost(0, stop) if stop else 0.0 for stop in range(len(x) + 1)]
    for _ in range(count - 1):
        best = [min(best[start] + cost(start, stop) for start in range(stop + 1)) for stop in range(len(x) + 1)]
    return best[-1]


def loss(values: torch.Tensor, table: torch.Tensor, importance=None) -> torch.Tensor:
    error = (values[..., None].double() - table[:, None]).abs().amin(-1).square()
    return (error if importance is None else error * importance).sum(1)


@pytest.mark.parametrize("count", BEST_OF_A_NORMAL)
def test_loss_on_a_gaussian(count):
    """Within 3 % of the best for the distribution: of 65,536 values, whose own best varies by about half a percent."""
    values = torch.randn(4, 1 << 16, generator=torch.Generator().manual_seed(count))
    found = loss(values, fit_tables(values, None, count)) / (1 << 16)
    assert float(found.mean()) == pytest.approx(BEST_OF_A_NORMAL[count], rel=0.03)


@pytest.mark.parametrize("weighted", [False, True])
def test_near_the_best_of_few_values(weighted):
    """Lloyd's steps end in a local optimum; on 40 values of four kinds it is never more than half above the best."""
    random = np.random.default_rng(3)
    rows = np.stack(
        [random.standard_normal(40), random.standard_t(2, 40), random.uniform(-1, 1, 40), random.laplace(size=40)]
    )
    importance = random.uniform(0.1, 3, 40) if weighted else np.ones(40)
    values = torch.from_numpy(rows).float()
    table = fit_tables(values, torch.from_numpy(importance) if weighted else None, 4)
    for row, found in zip(rows, loss(values, table, torch.from_numpy(importance)), strict=True):
        assert float(found) <= 1.5 * best_by_search(row.astype(np.float32).astype(float), importance, 4)


def test_columns_that_matter_get_the_values():
    """Half of the columns lie near -1 and 1 and count for all; the others spread wide and count for nothing."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.where(torch.rand(8, 200, generator=generator) < 0.5, -1.0, 1.0)
    values = torch.cat([inner, 20 * torch.randn(8, 200, generator=generator)], dim=1)
    importance = torch.cat([torch.ones(200), torch.zeros(200)])
    assert float(loss(values[:, :200], fit_tables(values, importance, 2)).max()) == 0
    assert float(loss(values[:, :200], fit_tables(values, None, 2)).min()) > 1


def test_the_rounding_tells_the_codec_what_columns_cost(tiny_model, tiny_text):
    from quern.core.machine.parallel import deterministic_workers
    from quern.core.recipe_parts import Rounding
    from quern.quantization.rounding.base import ROUNDINGS
    from quern.quantization.rounding.factor import factorize

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 96, generator=generator)
    weight[:, 48:] *= 8
    scale = torch.where(torch.arange(96) < 48, 30.0, 0.05)
    inputs = torch.randn(500, 96, generator=generator) * scale
    losses = {}
    with deterministic_workers(1) as workers:
        for order in (False, True):
            rounding = ROUNDINGS.get("gptq")(Rounding(activation_order=order))
            factor = factorize(inputs.T @ inputs, 0.01, order, workers)
            codec = make_codec({"codec": "kmeans", "bits": 3})
            rounded = rounding.round(weight.clone(), codec, factor, workers)
            losses[order] = float((rounded.decoded - weight)[:, :48].square().mean())
    plain = loss(weight[:, :48], fit_tables(weight, None, 8)).sum() / (64 * 48)
    assert all(found < 0.5 * float(plain) for found in losses.values()), (losses, float(plain))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_values_are_kept_exactly(granularity, bits):
    """Constant rows, all-zero rows, one row, one column, one value: empty cells change nothing."""
    group = {"group_size": 4} if granularity == "group" else {}
    codec = make_codec({"codec": "kmeans", "bits": bits, "granularity": granularity, "scale_dtype": "float32", **group})
    for weight in (
        torch.zeros(3, 20), torch.full((3, 20), -0.5), torch.tensor([[127.0, 0, -127, 64] * 5]), torch.full((1, 1), 2.5),
        torch.cat([torch.zeros(2, 8), torch.full((2, 8), 3.0)], dim=1),
    ):  # fmt: skip
        encoder = codec.encoder(weight, weight, refit=False)
        rounded = encoder.round_all(weight)
        assert torch.allclose(rounded, weight, rtol=2**-22, atol=1e-7)  # a scale is a 127th of the largest
        assert torch.equal(codec.decode(tuple(weight.shape), encoder.parts()), rounded)


def test_one_table_for_all_slabs_of_a_tensor():
    weight = torch.randn(100, 40, generator=torch.Generator().manual_seed(2))
    codec = make_codec({"codec": "kmeans", "bits": 4, "granularity": "tensor"})
    slabs = [codec.encoder(part, weight, refit=True) for part in (weight[:64], weight[64:])]
    for encoder, part in zip(slabs, (weight[:64], weight[64:]), strict=True):
        encoder.weigh(torch.linspace(1, 2, 40))
        encoder.round_all(part)
    first, second = (encoder.parts() for encoder in slabs)
    assert torch.equal(first["table"], second["table"])
    assert torch.equal(first["scale"], second["scale"])
    assert first["table"].shape == (1, 16)
