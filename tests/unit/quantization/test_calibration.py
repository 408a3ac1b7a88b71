"""Statistics of calibration: Hessians, token norms, histograms, activations on disk, one block in memory."""

import numpy as np
import pytest
import torch
from tiny_model import random_weights, tiny_config

from quern.architectures.base import architecture_of
from quern.core.errors import BadFileError, UserError
from quern.core.machine.parallel import Workers
from quern.observers.base import OBSERVERS
from quern.quantization.calibration.activations import WAVE_TOKENS, ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.hessian import TILE, add_to_hessian, norm_weights
from quern.quantization.calibration.histogram import BINS, InputHistogram


def tokens(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


# The Hessian


@pytest.mark.parametrize("columns", [1, 100, TILE + 76])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_hessian_is_the_weighted_sum_of_outer_products(columns, dtype, weighted, workers):
    """Against float64. A float32 sum of n products is off by at most n eps sum |x y| (Higham 2002, section 3.1); each factor
    carries two roundings of sqrt(weight) more."""
    hessian = torch.zeros(columns, columns)
    expected, sizes = (
        torch.zeros(columns, columns, dtype=torch.float64),
        torch.zeros(columns, columns, dtype=torch.float64),
    )
    for wave in range(2):
        x = tokens(70, columns, wave).to(dtype)
        weights = torch.rand(70, generator=torch.Generator().manual_seed(wave)) * 3 if weighted else None
        add_to_hessian(hessian, x, weights, workers)
        scaled = x.double() * (1 if weights is None else weights.double()[:, None])
        expected += scaled.T @ x.double()
        sizes += scaled.abs().T @ x.double().abs()
    bound = (2 * 70 + 6) * 2.0**-24 * sizes
    assert bool(((hessian.double() - expected).abs() <= bound).triu().equal(torch.ones(columns, columns).triu().bool()))
    assert float(expected.triu(1).abs().max()) > 0 or columns == 1


def test_hessian_below_the_tiles_is_left_alone(workers):
    hessian = torch.zeros(TILE + 10, TILE + 10)
    add_to_hessian(hessian, tokens(5, TILE + 10), None, workers)
    assert float(hessian[TILE:, :TILE].abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessian_does_not_depend_on_threads(dtype):
    results = []
    for threads in (1, 2, 3):
        pool = Workers(threads)
        hessian = torch.zeros(2 * TILE + 50, 2 * TILE + 50)
        add_to_hessian(
            hessian,
            tokens(64, len(hessian)).to(dtype),
            torch.rand(64, generator=torch.Generator().manual_seed(1)),
            pool,
        )
        results.append(hessian)
        pool.close()
    assert torch.equal(results[0].triu(), results[1].triu())
    assert torch.equal(results[0].triu(), results[2].triu())


def test_weights_below_zero_count_nothing(workers):
    x, hessian, clean = tokens(4, 8), torch.zeros(8, 8), torch.zeros(8, 8)
    add_to_hessian(hessian, x, torch.tensor([1.0, -1e-9, 2.0, 0.0]), workers)
    add_to_hessian(clean, x[[0, 2]], torch.tensor([1.0, 2.0]), workers)
    assert torch.allclose(hessian, clean, rtol=1e-6)


def test_norm_weights_bring_every_token_to_unit_norm():
    x = tokens(50, 16) * torch.logspace(-6, 6, 50)[:, None]
    x[7] = 0
    weights = norm_weights(x)
    assert weights[7] == 0
    norms = (x.double() * weights.double().sqrt()[:, None]).norm(dim=1)
    assert np.allclose(np.delete(norms.numpy(), 7), 1, rtol=1e-5)
    assert bool(norm_weights(x.bfloat16()).isfinite().all())


# The histogram


def test_counts_are_numpys():
    histogram, x = InputHistogram(), tokens(300, 40)
    histogram.add(x)
    expected, _ = np.histogram(np.abs(x.numpy()), BINS, (0, float(x.abs().max())))
    assert histogram.limit == float(x.abs().max())
    assert histogram.counts.sum() == x.numel()
    # A value at a bin's edge may be put on either side of it, in float32 or in float64.
    assert np.abs(histogram.counts.numpy().cumsum() - expected.cumsum()).max() <= 2


def test_a_larger_value_doubles_the_bins_without_losing_any():
    histogram, x = InputHistogram(), tokens(100, 40)
    histogram.add(x)
    limit, before = histogram.limit, histogram.counts.clone()
    histogram.add(torch.tensor([5 * limit]))
    assert histogram.limit == 8 * limit
    merged = before.view(-1, 8).sum(1)
    merged = torch.cat([merged, torch.zeros(BINS - len(merged), dtype=torch.float64)])
    merged[int(5 / 8 * BINS)] += 1
    assert torch.equal(histogram.counts, merged)


@pytest.mark.parametrize("observer", OBSERVERS.names())
def test_static_scales_cover_what_came(observer):
    histogram, x = InputHistogram(), tokens(500, 64)
    for part in x.split(100):
        histogram.add(part)
    largest = float(x.abs().max())
    scale = histogram.scale(OBSERVERS.get(observer)())
    assert 0.4 * largest * 2 / 255 <= scale <= (largest + histogram.limit / BINS) * 2 / 255 * (1 + 1e-6)
    if observer == "min_max":
        assert scale >= largest * 2 / 255 * (1 - 1e-6)
    if observer == "percentile":
        clipped = float((x.abs() > scale * 127.5 + histogram.limit / BINS).float().mean())
        assert clipped <= 0.001


@pytest.mark.parametrize("observer", OBSERVERS.names())
def test_an_outlier_moves_only_the_observers_that_look_at_it(observer):
    """64,000 ordinary values and one 50 times larger than any of them."""
    histogram, x = InputHistogram(), tokens(1000, 64)
    histogram.add(x)
    histogram.add(torch.tensor([50 * float(x.abs().max())]))
    ratio = histogram.scale(OBSERVERS.get(observer)()) * 127.5 / float(x.abs().max())
    assert ratio == pytest.approx(50, rel=0.05) if observer == "min_max" else True
    assert ratio < 2 if observer == "percentile" else True


def test_inputs_that_are_all_zero_give_the_least_scale():
    histogram = InputHistogram()
    histogram.add(torch.zeros(10, 4))
    assert histogram.scale(OBSERVERS.get("min_max")()) == torch.finfo(torch.float32).tiny
    histogram.add(torch.ones(3))
    assert histogram.limit == 1
    assert InputHistogram().scale(OBSERVERS.get("min_max")()) == torch.finfo(torch.float32).tiny


# Activations on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_come_back_by_waves(dtype, tmp_path):
    file = ActivationFile(tmp_path / "deep" / "x.bin", (70, 64, 8), dtype)
    x = tokens(70 * 64, 8).view(70, 64, 8)
    file.write(lambda start, stop: x[start:stop])
    assert file.waves() == [(0, 32), (32, 64), (64, 70)]
    assert all((stop - start) * 64 <= WAVE_TOKENS for start, stop in file.waves())
    assert torch.equal(torch.cat([file.read(*wave) for wave in file.waves()]), x.to(dtype))
    assert torch.equal(file.read(69, 70), x[69:].to(dtype))
    assert ActivationFile(tmp_path / "y", (3, 5000, 8), dtype).waves() == [(0, 1), (1, 2), (2, 3)]


def test_activations_appear_whole_or_not_at_all(tmp_path):
    file = ActivationFile(tmp_path / "x.bin", (70, 64, 8), torch.float32)

    def fails_late(start, stop):
        if start:
            raise UserError("stop")
        return torch.zeros(stop - start, 64, 8)

    with pytest.raises(UserError, match="stop"):
        file.write(fails_late)
    assert list(tmp_path.iterdir()) == []
    file.write(lambda start, stop: torch.zeros(stop - start, 64, 8))
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(BadFileError, match="truncated"):
        file.read(69, 70)


# A block in memory


@pytest.fixture(scope="module")
def block() -> Block:
    config = tiny_config("qwen3")
    return Block(architecture_of(config), 1, random_weights(config).__getitem__, torch.float32, 12)


def test_capture_is_what_the_linear_reads(block, workers):
    x, seen = tokens(5 * 12, 64).view(5, 12, 64), []
    handle = block.linear("mlp.down_proj").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for sequence in x:
            block.run(sequence[None])
    handle.remove()
    captured = block.capture(["mlp.down_proj"], x, workers)["mlp.down_proj"].inputs
    assert captured.shape == (60, 96)
    assert torch.equal(captured, torch.cat([one[0] for one in seen]))


def test_results_do_not_depend_on_threads(block):
    x = tokens(7 * 12, 64).view(7, 12, 64)
    results = []
    for threads in (1, 2, 3):
        pool = Workers(threads)
        results.append(
            (block.run_each(x, pool), block.capture(["self_attn.o_proj"], x, pool)["self_attn.o_proj"].inputs)
        )
        pool.close()
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


def test_recording_ends_with_the_block(block):
    x = tokens(12, 64)[None]
    names = ["mlp.up_proj", "self_attn.q_proj"]
    with block.recording(names):
        result, outputs = block.run_recorded(x)
    assert [(tuple(output.shape), tokens) for output, tokens in outputs] == [((1, 12, 96), None), ((1, 12, 64), None)]
    assert torch.equal(result, block.run(x))
    assert not any(module._forward_hooks for module in block.module.modules())
