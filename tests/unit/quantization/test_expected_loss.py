"""What rounding is expected to lose on other text, against roundings that were carried out."""

import itertools

import pytest
import torch

from quern.core.machine.parallel import deterministic_workers
from quern.quantization.expected_loss import expected_loss


def inputs_of(tokens, mixing, seed):
    made = torch.randn(tokens, len(mixing), generator=torch.Generator().manual_seed(seed)) @ mixing
    return made.float()


@pytest.fixture(scope="module")
def mixing():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, 48, generator=generator) @ torch.diag(torch.arange(1, 49).float().pow(-0.7))


def fed_back(weight, hessian):
    """Plain error feedback onto multiples of 1: column k is rounded after adding what those before it got wrong, by the
    regression of k's input on theirs."""
    rounded = torch.zeros_like(weight)
    for k in range(weight.shape[1]):
        change = weight[:, :k] - rounded[:, :k]
        # With the columns behind k free, the best that is left to do for k: minimize over the later ones.
        later = slice(k, None)
        shift = (
            torch.linalg.solve(hessian[later, later], hessian[later, :k] @ change.T).T
            if k
            else torch.zeros(len(weight), 48)
        )
        rounded[:, k] = (weight[:, k] + shift[:, 0]).round()
    return rounded


@pytest.mark.parametrize("tokens", [64, 256, 4096])
def test_it_is_the_mean_loss_of_rounding(mixing, tokens):
    calibration, other = inputs_of(tokens, mixing, 1), inputs_of(512, mixing, 2)
    damping = 0.01
    hessian = calibration.T @ calibration
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(48)
    weight = 40 * torch.randn(600, 48, generator=torch.Generator().manual_seed(3)).double()
    lost = (other.double() @ (fed_back(weight, damped) - weight).T).square().sum(0)
    with deterministic_workers(2) as workers:
        expected = expected_loss(hessian, other, damping, workers) / 12  # the variance of rounding to multiples of 1
    margin = 4 * float(lost.std()) / len(lost) ** 0.5
    assert float(lost.mean()) == pytest.approx(expected, abs=margin)


def test_more_text_lowers_it_ever_less(mixing):
    other = inputs_of(2048, mixing, 2)
    with deterministic_workers(1) as workers:
        losses = []
        for tokens in (64, 256, 1024, 4096):
            calibration = inputs_of(tokens, mixing, 1)
            losses.append(expected_loss(calibration.T @ calibration, other, 0.001, workers))
    falls = [before - after for before, after in itertools.pairwise(losses)]
    assert falls[0] > falls[1] > falls[2]
    assert falls[1] > 0


def test_the_hessian_stays(mixing):
    calibration = inputs_of(64, mixing, 1)
    hessian = calibration.T @ calibration
    before = hessian.clone()
    with deterministic_workers(1) as workers:
        expected_loss(hessian, calibration, 0.01, workers)
    assert torch.equal(hessian, before)
