"""Sweeps over rounded columns: never worse, said as it is, and stored as it is said, for every codec."""

import pytest
import torch
from schemes import ALL, gaussian, make_codec, scheme_id

from quern.codecs.base import decode
from quern.core.machine.parallel import Workers
from quern.core.recipe_parts import Rounding as Settings
from quern.quantization.rounding.factor import Factor, KeptHessian, factorize
from quern.quantization.rounding.gptq import Gptq
from quern.quantization.rounding.sweeps import sweep

ROWS, COLUMNS = 48, 96


def hessian(columns: int = COLUMNS) -> torch.Tensor:
    """Of correlated inputs of different sizes."""
    mix = torch.eye(columns) + gaussian(columns, columns, 7) / columns**0.5
    inputs = gaussian(4 * columns, columns, 8) @ mix * torch.logspace(-0.5, 0.5, columns)
    return inputs.T @ inputs


def damped(plain: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return plain + damping * plain.diagonal().mean() * torch.eye(len(plain))


def factor_of(plain: torch.Tensor, order: bool = False) -> Factor:
    return factorize(plain.clone(), 0.01, order, Workers(1), keep=True)


def loss_of(change: torch.Tensor, plain: torch.Tensor) -> float:
    change = change.double()
    return float((change * (change @ damped(plain).double())).sum())


@pytest.mark.parametrize("scheme", ALL, ids=scheme_id)
def test_they_lose_less_and_say_what_is_stored(scheme):
    codec, plain, weight = make_codec(scheme), hessian(), gaussian(ROWS, COLUMNS)
    losses = []
    for sweeps in (0, 2):
        rounding = Gptq(Settings(sweeps=sweeps))
        found = rounding.round(weight, codec, factor_of(plain), Workers(1))
        assert torch.equal(decode(found.weight), found.decoded)
        losses.append(loss_of(found.decoded - weight, plain))
        # float32 sums of 96 x 96 terms of either sign, of which the loss is the small rest.
        assert found.loss == pytest.approx(losses[-1], rel=1e-3)
    assert losses[1] < losses[0], "a sweep rounds what error feedback did not foresee"


def test_with_another_order_of_columns():
    codec, plain, weight = make_codec({"bits": 3, "group_size": 32}), hessian(), gaussian(ROWS, COLUMNS)
    found = [
        Gptq(Settings(sweeps=sweeps, activation_order=True)).round(weight, codec, factor_of(plain, True), Workers(1))
        for sweeps in (0, 1)
    ]
    first, second = (loss_of(one.decoded - weight, plain) for one in found)
    assert second < first
    assert found[1].loss == pytest.approx(second, rel=1e-3)


def test_one_sweep_is_coordinate_descent():
    """Against the rule written out: one weight after the other gets the value of least loss, all others fixed."""
    scheme = {"bits": 2, "symmetric": True, "granularity": "tensor"}
    codec, plain, weight = make_codec(scheme), hessian(12), gaussian(5, 12)
    whole = damped(plain).double()
    encoder = codec.encoder(weight, weight, refit=False)
    start = encoder.round_all(weight)
    sizes = start.abs()
    scale = float(sizes[sizes > 0].min())
    grid = scale * torch.arange(-2, 2, dtype=torch.float64)
    expected = start.double().clone()
    for column in range(12):
        for row in range(5):
            tries = expected[row].repeat(len(grid), 1)
            tries[:, column] = grid
            change = tries - weight[row].double()
            expected[row, column] = grid[((change @ whole) * change).sum(1).argmin()]
    sweep(weight, start, encoder, KeptHessian(whole.float()), 1)
    found = codec.decode((5, 12), encoder.parts())
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_a_refitted_scale_is_the_best_that_can_be_stored():
    """Of one row that shares a scale: no scale nearby loses less with these codes."""
    codec, plain, weight = (
        make_codec({"bits": 3, "granularity": "channel", "scale_dtype": "float32"}),
        hessian(16),
        gaussian(1, 16),
    )
    encoder = codec.encoder(weight, weight, refit=False)
    sweep(weight, encoder.round_all(weight), encoder, KeptHessian(damped(plain)), 1)
    decoded = codec.decode((1, 16), encoder.parts())
    least = loss_of(decoded - weight, plain)
    for factor in (0.999, 1.001):
        assert loss_of(decoded * factor - weight, plain) > least


def test_scales_that_cannot_be_stored_are_the_next_ones_that_can():
    codec, weight = make_codec({"bits": 4, "granularity": "channel"}), gaussian(4, 16) * 1e4
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    before = encoder.parts()["scale"].float()[:, 0]
    ratio = encoder.rescale(0, torch.tensor([1e9, 1.0, 0.5, 1.0]))
    after = encoder.parts()["scale"].float()[:, 0]
    assert after.isfinite().all()
    assert float(after[0]) == torch.finfo(torch.float16).max
    assert torch.allclose(after, before * ratio)
    assert torch.equal(ratio[1::2], torch.ones(2))
