"""What every rounding promises, and GPTQ against the published algorithm written out plainly."""

import pytest
import torch
from schemes import gaussian, make_codec
from torch import Tensor

from quern.codecs.base import decode
from quern.core.errors import UserError
from quern.core.machine.parallel import Workers
from quern.core.recipe_parts import Rounding as Settings
from quern.quantization.calibration.hessian import add_to_hessian
from quern.quantization.rounding.base import ROUNDINGS, SLAB
from quern.quantization.rounding.factor import SAMPLED_ROWS, Factor, factorize

FOUR_BITS = {"codec": "integer", "bits": 4, "symmetric": False, "granularity": "group", "group_size": 32}
SCHEMES = {
    "group": FOUR_BITS,
    "group tail": FOUR_BITS | {"group_size": 48},
    "channel": {"codec": "integer", "bits": 3, "symmetric": True, "granularity": "channel"},
    "tensor": {"codec": "integer", "bits": 4, "symmetric": False, "granularity": "tensor"},
}
DAMPING = 0.01


@pytest.fixture
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


def inputs(tokens: int = 300, columns: int = 100, seed: int = 3) -> Tensor:
    """Correlated inputs of very different sizes, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + mix)
    return x * torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=generator)]


def hessian_of(x: Tensor, workers: Workers) -> Tensor:
    hessian = torch.zeros(x.shape[1], x.shape[1])
    add_to_hessian(hessian, x, None, workers)
    return hessian


def damped(x: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian as rounding sees it, float64, computed densely."""
    dense = x.double().T @ x.double()
    return dense + damping * dense.diagonal().mean() * torch.eye(len(dense), dtype=torch.float64)


def quadratic(change: Tensor, hessian: Tensor) -> float:
    return float((change.double() @ hessian * change.double()).sum())


def run(method: str, weight: Tensor, codec, x: Tensor, workers: Workers, **settings):
    rounding = ROUNDINGS.get(method)(Settings(method=method, damping=DAMPING, **settings))
    factor = None
    if rounding.needs_hessian:
        factor = factorize(hessian_of(x, workers), DAMPING, settings.get("activation_order", False), workers)
    return rounding.round(weight, codec, factor, workers)


def suited(method: str, weight: Tensor, codec) -> Tensor:
    """``weight``, or the values of ``codec`` nearest to it for a rounding that takes no others."""
    if not ROUNDINGS.get(method).keeps_values:
        return weight
    return codec.encoder(weight, weight, refit=False).round_all(weight)


@pytest.fixture(params=ROUNDINGS.names())
def method(request):
    return request.param


@pytest.fixture(params=SCHEMES)
def codec(request):
    return make_codec(SCHEMES[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_what_is_stored(method, codec, dtype, workers):
    weight = suited(method, gaussian(40, 100), codec).to(dtype)
    if ROUNDINGS.get(method).keeps_values and dtype == torch.bfloat16:
        with pytest.raises(UserError, match="are not values of"):  # they were, before that rounded them
            run(method, weight, codec, inputs(), workers)
        return
    before = weight.clone()
    rounded = run(method, weight, codec, inputs(), workers)
    assert torch.equal(weight, before), "the input is not to be touched"
    assert rounded.decoded.dtype == dtype
    assert torch.equal(decode(rounded.weight).to(dtype), rounded.decoded)
    assert rounded.weight.shape == (40, 100)
    assert rounded.weight.scheme == codec.scheme
    assert {name: (tuple(p.shape), p.dtype) for name, p in rounded.weight.parts.items()} == codec.part_shapes((40, 100))


def test_threads_do_not_change_a_byte(method, codec):
    weight, x = suited(method, gaussian(SLAB + 100, 100), codec), inputs()
    results = []
    for threads in (1, 2, 3):
        pool = Workers(threads)
        results.append(run(method, weight, codec, x, pool))
        pool.close()
    for other in results[1:]:
        assert torch.equal(other.decoded, results[0].decoded)
        assert other.relative_loss == results[0].relative_loss
        for name, part in results[0].weight.parts.items():
            assert torch.equal(other.weight.parts[name], part), name


def test_reported_error_is_the_true_one(method, codec, workers):
    """Exact but for float32 sums, because no rows are left out of at most 64.

    A dot product of n = 100 float32 terms is off by at most about n eps = 1.2e-5 of the sum of sizes; the quadratic form adds up
    positive terms of twice that, so 1e-4 holds with room for the conditioning of the feedback.
    """
    weight, x = suited(method, gaussian(SAMPLED_ROWS, 100), codec), inputs()
    rounded = run(method, weight, codec, x, workers)
    hessian = damped(x) if ROUNDINGS.get(method).needs_hessian else torch.eye(100, dtype=torch.float64)
    truth = quadratic(weight - rounded.decoded, hessian) / quadratic(weight, hessian)
    assert rounded.relative_loss == pytest.approx(truth, rel=1e-4)


def test_reported_error_is_estimated_from_a_sample_of_many_rows(method, workers):
    codec = make_codec(SCHEMES["group"])
    weight = suited(method, torch.randn(SLAB + 300, 64, generator=torch.Generator().manual_seed(1)), codec)
    x = inputs(columns=64)
    rounded = run(method, weight, codec, x, workers)
    hessian = damped(x) if ROUNDINGS.get(method).needs_hessian else torch.eye(64, dtype=torch.float64)
    truth = quadratic(weight - rounded.decoded, hessian) / quadratic(weight, hessian)
    # The size of Gaussian rows varies by up to sqrt(2) of itself, the mean of 64 sampled ones by a fifth of that; 3 of those.
    assert rounded.relative_loss == pytest.approx(truth, rel=3 * 2**0.5 / SAMPLED_ROWS**0.5)


def test_never_worse_than_nearest_in_its_own_measure(method, codec, workers):
    """Summed over a matrix: a single row may lose, because feedback is greedy."""
    weight, x = suited(method, gaussian(64, 100), codec), inputs()
    hessian = damped(x)
    nearest = quadratic(weight - run("nearest", weight, codec, x, workers).decoded, hessian)
    this = quadratic(weight - run(method, weight, codec, x, workers).decoded, hessian)
    assert this <= nearest
    if ROUNDINGS.get(method).needs_hessian:
        assert this < 0.8 * nearest, "correlated inputs: error feedback must gain"


def test_single_rows_and_columns(method, workers):
    for rows, columns in ((1, 100), (3, 1), (1, 1), (33, 31)):
        codec = make_codec(FOUR_BITS)
        weight, x = suited(method, gaussian(rows, columns), codec), inputs(columns=columns)
        rounded = run(method, weight, codec, x, workers)
        assert torch.equal(decode(rounded.weight), rounded.decoded)
        assert 0 <= rounded.relative_loss < 1


def test_a_zero_matrix_loses_nothing(method, codec, workers):
    rounded = run(method, torch.zeros(5, 100), codec, inputs(), workers)
    assert rounded.relative_loss == 0
    assert torch.equal(rounded.decoded, torch.zeros(5, 100))


@pytest.mark.parametrize("name", [name for name in ROUNDINGS.names() if ROUNDINGS.get(name).keeps_values])
def test_one_that_keeps_values_keeps_them_or_refuses(name, codec, workers):
    weight = suited(name, gaussian(SLAB + 40, 100), codec)
    rounded = run(name, weight, codec, inputs(), workers)
    assert torch.equal(rounded.decoded, weight)
    assert (rounded.loss, rounded.relative_loss) == (0, 0)
    assert not ROUNDINGS.get(name).needs_hessian
    weight[SLAB + 3, :2] = torch.tensor([1.0, torch.pi])
    with pytest.raises(UserError, match=r"are not values of \{codec: integer, bits: .*rounding nearest"):
        run(name, weight, codec, inputs(), workers)


# GPTQ


def textbook_gptq(weight: Tensor, hessian: Tensor, codec, refit: bool) -> Tensor:
    """Q of Frantar et al. 2022, algorithm 1 with blocks of one column, in float64.

    Takes the rows of the Cholesky factor of the inverse Hessian; group scales are fitted to the updated weights where the group
    begins (as the authors' code does), each column weighed by the loss of an error in it, 1 / U_kk^2.
    """
    work, result = weight.double().clone(), torch.empty(weight.shape, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    encoder = codec.encoder(weight, weight, refit)
    for k in range(weight.shape[1]):
        if encoder.refit_width and k % encoder.refit_width == 0:
            group = slice(k, min(k + encoder.refit_width, weight.shape[1]))
            encoder.refit(k, work[:, group].T.float(), upper.diagonal()[group].float() ** -2)
        result[:, k] = encoder.round(k, work[:, k].float()[None])[0]
        error = (work[:, k] - result[:, k]) / upper[k, k]
        work[:, k + 1 :] -= torch.outer(error, upper[k, k + 1 :])
    return result.float()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("block", [1, 7, 48, 64, 128])
def test_gptq_is_the_published_algorithm(name, block, workers):
    """A value within float32's error of the middle between two codes may fall to either side, and what follows in its row then
    differs; everything else is equal. Either choice costs the same at first order, so the losses agree closely."""
    weight, x, codec = gaussian(48, 100), inputs(), make_codec(SCHEMES[name])
    expected = textbook_gptq(weight, damped(x), codec, refit=True)
    rounded = run("gptq", weight, codec, x, workers, block_size=block)
    agreement = float((rounded.decoded == expected).float().mean())
    assert agreement >= 0.99
    loss, oracle = (quadratic(weight - q, damped(x)) for q in (rounded.decoded, expected))
    assert loss == pytest.approx(oracle, rel=1e-2 if agreement < 1 else 1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_activation_order_is_the_algorithm_on_sorted_columns(name, workers):
    weight, x, codec = gaussian(48, 100), inputs(), make_codec(SCHEMES[name])
    rounded = run("gptq", weight, codec, x, workers, activation_order=True)
    order = x.double().square().sum(0).argsort(descending=True)
    assert order.tolist() != list(range(100))
    hessian = damped(x)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    encoder, work = codec.encoder(weight, weight, refit=False), weight.double()[:, order]
    expected = torch.empty(48, 100)
    for k, column in enumerate(order.tolist()):
        expected[:, column] = encoder.round(column, work[:, k].float()[None])[0]
        error = (work[:, k] - expected[:, column]) / upper[k, k]
        work[:, k + 1 :] -= torch.outer(error, upper[k, k + 1 :])
    assert float((rounded.decoded == expected).float().mean()) >= 0.99
    assert quadratic(weight - rounded.decoded, hessian) == pytest.approx(
        quadratic(weight - expected, hessian), rel=1e-2
    )


def test_blocks_are_for_speed_only(workers):
    weight, x = gaussian(64, 200), inputs(columns=200)
    hessian, codec = damped(x), make_codec(FOUR_BITS)
    losses = [
        quadratic(weight - run("gptq", weight, codec, x, workers, block_size=size).decoded, hessian)
        for size in (1, 32, 100, 128, 1000)
    ]
    assert max(losses) == pytest.approx(min(losses), rel=1e-2)


@pytest.mark.parametrize("order", [False, True])
def test_inputs_that_never_fire_are_rounded_to_nearest(order, workers):
    """They neither get nor cause feedback: nobody will ever see the error."""
    weight, x = gaussian(16, 64), inputs(columns=64)
    dead = torch.tensor([0, 5, 31, 32, 63])
    x[:, dead] = 0
    codec = make_codec({"codec": "integer", "bits": 4, "symmetric": True, "granularity": "channel"})
    rounded = run("gptq", weight, codec, x, workers, activation_order=order)
    nearest = run("nearest", weight, codec, x, workers)
    assert torch.equal(rounded.decoded[:, dead], nearest.decoded[:, dead])
    assert not torch.equal(rounded.decoded, nearest.decoded)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_hessian_that_overflowed_is_refused_with_the_way_out(value, workers):
    hessian = torch.eye(300)
    hessian[3, 3] = value
    with pytest.raises(UserError, match="squares overflow float32. Check the checkpoint"):
        factorize(hessian, DAMPING, False, workers)


def test_no_token_at_all_means_nearest(workers):
    weight, codec = gaussian(16, 64), make_codec(SCHEMES["channel"])
    factor = factorize(torch.zeros(64, 64), DAMPING, False, workers)
    rounded = ROUNDINGS.get("gptq")(Settings()).round(weight, codec, factor, workers)
    assert torch.equal(rounded.decoded, run("nearest", weight, codec, inputs(columns=64), workers).decoded)


# The factorization


def rebuilt(factor: Factor) -> Tensor:
    upper = factor.upper.triu(1).double() + torch.eye(len(factor.upper), dtype=torch.float64)
    return upper @ torch.diag(factor.diagonal.double()) @ upper.T


@pytest.mark.parametrize("columns", [1, 2, 255, 256, 257, 600, 1100])
@pytest.mark.parametrize("order", [False, True])
def test_the_factor_gives_the_damped_hessian_back(columns, order, workers):
    """Within Cholesky's backward error (Higham 2002, theorem 10.3): |A - R R^T| <= (n + 1) eps |R| |R^T|, whose entries are at
    most sqrt(a_ii a_jj); float32 eps = 6e-8, and the entries here are scaled by exactly these roots."""
    x = inputs(tokens=columns + 50, columns=columns)
    factor = factorize(hessian_of(x, workers), DAMPING, order, workers)
    hessian = damped(x)
    if order:
        assert factor.order is not None
        assert sorted(factor.order.tolist()) == list(range(columns))
        assert bool((x.square().sum(0)[factor.order].diff() <= 1e-3).all())
        hessian = hessian[factor.order][:, factor.order]
    else:
        assert factor.order is None
    size = hessian.diagonal().sqrt()
    error = (rebuilt(factor) - hessian).abs() / size[:, None] / size[None, :]
    assert float(error.max()) <= 4 * (columns + 1) * 2.0**-24 + 1e-6
    assert bool((factor.diagonal > 0).all())


@pytest.mark.parametrize("columns", [300, 1100])
def test_the_factor_does_not_depend_on_threads(columns):
    factors = []
    for threads in (1, 2, 3):
        pool = Workers(threads)
        factors.append(factorize(hessian_of(inputs(columns=columns), pool), DAMPING, False, pool))
        pool.close()
    for other in factors[1:]:
        assert torch.equal(other.upper.triu(1), factors[0].upper.triu(1))
        assert torch.equal(other.diagonal, factors[0].diagonal)


def test_only_the_upper_triangle_is_read(workers):
    x = inputs(columns=300)
    whole = hessian_of(x, workers)
    nonsense = whole.triu() + torch.full_like(whole, torch.nan).tril(-1)
    for order in (False, True):
        first, second = (factorize(h.clone(), DAMPING, order, workers) for h in (whole, nonsense))
        assert torch.equal(first.upper.triu(1), second.upper.triu(1))
        assert torch.equal(first.diagonal, second.diagonal)


def test_a_nearly_singular_hessian_is_factorized_all_the_same(workers):
    """One direction repeated over all inputs, hardly damped: rounding errors make it indefinite."""
    x = torch.ones(400, 1) * torch.randn(1, 400, generator=torch.Generator().manual_seed(1)) * 1e3
    factor = factorize(hessian_of(x, Workers(1)), 1e-7, False, workers)
    assert bool(factor.upper.triu(1).isfinite().all())
    assert bool((factor.diagonal > 0).all())
    assert bool(factor.diagonal.isfinite().all())
