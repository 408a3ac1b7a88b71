"""What every transform promises (nothing changes before rounding, not a bit), and the formulas of the two."""

import pytest
import torch
from schemes import make_codec
from tiny_model import block_weights, tiny_config

from quern.architectures.base import ARCHITECTURES, architecture_of
from quern.core.errors import UserError
from quern.core.machine.parallel import Workers
from quern.core.recipe_parts import Transform as Settings
from quern.quantization.calibration.block import Block
from quern.quantization.transforms.awq import STEPS, Awq
from quern.quantization.transforms.base import (
    LARGEST_EXPONENT,
    TRANSFORMS,
    ChannelScaling,
    ChannelStatistics,
    InputRotation,
    Repeat,
    fold,
    foldable,
    power_of_two,
)
from quern.quantization.transforms.smoothquant import SmoothQuant
from quern.rotation.rotation import unpack_signs

TIME = 12
FOUR_BITS = {"codec": "integer", "bits": 4, "symmetric": False, "granularity": "group", "group_size": 32}


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.close()


def block_of(family: str, dtype: torch.dtype, **changes) -> Block:
    config = tiny_config(family, num_hidden_layers=1, **changes)
    weights = block_weights(config, seed=4)
    return Block(architecture_of(config), 0, weights.__getitem__, dtype, TIME)


def hidden(width: int = 64, seed: int = 5) -> torch.Tensor:
    """Two sequences with outlier channels."""
    x = torch.randn(2, TIME, width, generator=torch.Generator().manual_seed(seed))
    return x * torch.where(torch.arange(width) % 13 == 0, 20.0, 1.0)


def captured(block: Block, linear: str, x: torch.Tensor, workers: Workers) -> torch.Tensor:
    return block.capture([linear], x, workers)[linear].inputs


def statistics_of(inputs: torch.Tensor) -> ChannelStatistics:
    sizes = inputs.float().abs()
    return ChannelStatistics(sizes.mean(0), sizes.amax(0), inputs.float())


@pytest.fixture(params=[name for name in TRANSFORMS.names() if issubclass(TRANSFORMS.get(name), ChannelScaling)])
def method(request):
    return request.param


@pytest.mark.parametrize("family", ARCHITECTURES.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (4, 4)])
def test_a_rewritten_block_computes_the_same_bits(method, family, dtype, heads, workers):
    block = block_of(family, dtype, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    architecture, x = architecture_of(tiny_config(family, num_key_value_heads=heads[1])), hidden().to(dtype)
    before = block.run_each(x, workers)
    codec = make_codec(FOUR_BITS)
    for rescaling in architecture.block(0).rescalings:
        inputs = captured(block, rescaling.targets[0], x, workers)
        repeat = Repeat.of(rescaling)
        targets = [block.linear(name).weight.data for name in rescaling.targets]
        kept = [target.clone() for target in targets]
        found = TRANSFORMS.get(method)(Settings(method=method)).scales(
            targets, [codec] * len(targets), statistics_of(inputs), repeat, workers
        )
        assert all(torch.equal(a, b) for a, b in zip(kept, targets, strict=True)), "choosing scales changes no weight"
        assert found.shape == (targets[0].shape[1] // repeat.times,)
        noise = torch.randint(-2, 3, found.shape, generator=torch.Generator().manual_seed(6))  # AWQ may find 1 best
        scales = power_of_two(found) * torch.exp2(noise.float())
        fold(rescaling, block.module.get_submodule, scales, repeat)
        assert torch.equal(captured(block, rescaling.targets[0], x, workers), inputs / repeat(scales).to(dtype))
    assert torch.equal(block.run_each(x, workers), before)


@pytest.mark.parametrize("family", ARCHITECTURES.names())
def test_folding_is_undone_by_its_inverse(family):
    block = block_of(family, torch.bfloat16)
    architecture = architecture_of(tiny_config(family))
    before = {name: p.clone() for name, p in block.module.named_parameters()}
    for rescaling in architecture.block(0).rescalings:
        repeat = Repeat.of(rescaling)
        width = block.linear(rescaling.targets[0]).in_features // repeat.times
        scales = torch.exp2(torch.randint(-8, 9, (width,), generator=torch.Generator().manual_seed(1)).float())
        fold(rescaling, block.module.get_submodule, scales, repeat)
        moved = [name for name, p in block.module.named_parameters() if not torch.equal(p, before[name])]
        assert {name.rsplit(".", 1)[0] for name in moved} == {rescaling.source, *rescaling.targets}
        fold(rescaling, block.module.get_submodule, 1 / scales, repeat)
        assert all(torch.equal(p, before[name]) for name, p in block.module.named_parameters())


def test_scales_are_positive_powers_of_two_within_bounds():
    given = torch.tensor([1.0, 1.41, 1.42, 0.71, 0.70, 3e-9, 1e9, 0.0, -2.0, torch.nan, torch.inf, -torch.inf])
    expected = [1.0, 1.0, 2.0, 1.0, 0.5, 2.0**-LARGEST_EXPONENT, 2.0**LARGEST_EXPONENT, 1, 1, 1, 1, 1]
    assert power_of_two(given).tolist() == expected


def folded(kind: str, stored: torch.dtype, rounded: set[str], family: str = "qwen2"):
    """Scales that are no powers of two, made foldable; the block before and after, float32."""
    block = block_of(family, torch.float32)
    architecture = architecture_of(tiny_config(family))
    rescaling = next(rescaling for rescaling in architecture.block(0).rescalings if rescaling.kind == kind)
    repeat, source = Repeat.of(rescaling), block.module.get_submodule(rescaling.source)
    source.weight.data = (
        (1 + torch.rand(source.weight.shape, generator=torch.Generator().manual_seed(2))).to(stored).float()
    )
    width = block.linear(rescaling.targets[0]).in_features // repeat.times
    wanted = torch.linspace(0.3, 3, width)
    scales = foldable(rescaling, source, wanted, rounded, stored)
    return block, rescaling, repeat, wanted, scales


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_norm_takes_the_nearest_scales_that_its_dtype_can_store(stored, workers):
    names = set(block_of("qwen2", torch.float32).module.state_dict())
    block, rescaling, repeat, wanted, scales = folded("norm", stored, {name.removesuffix(".weight") for name in names})
    assert bool(((scales / wanted - 1).abs() <= torch.finfo(stored).eps).all()), "half a unit of the norm's weight"
    x = hidden()
    before = captured(block, rescaling.targets[0], x, workers)
    fold(rescaling, block.module.get_submodule, scales, repeat)
    norm = block.module.get_submodule(rescaling.source)
    assert torch.allclose(norm.weight, norm.weight.to(stored).float(), rtol=2**-22, atol=0)
    norm.weight.data = norm.weight.to(stored).float()  # what the artifact keeps
    after = captured(block, rescaling.targets[0], x, workers) * repeat(scales)
    # Four float32 roundings of half an ulp each; storing w / s itself would cost a bfloat16 or float16 one.
    assert torch.allclose(after, before, rtol=2**-22, atol=0)


@pytest.mark.parametrize("kind", ["norm", "linear", "value"])
def test_what_is_stored_unrounded_gets_powers_of_two(kind):
    everything = {linear.name for linear in architecture_of(tiny_config("qwen2")).block(0).linears}
    *_, scales = folded(kind, torch.bfloat16, set())
    assert torch.equal(scales, power_of_two(scales))
    *_, wanted, scales = folded(kind, torch.bfloat16, everything)
    if kind == "value":  # its bias is stored as it is
        assert torch.equal(scales, power_of_two(scales))
    else:
        assert bool(((scales / wanted - 1).abs() <= 2**-7).all())


def test_dead_channels_get_no_scale(method, workers):
    x = hidden().flatten(0, 1)
    x[:, [3, 40]] = 0
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    scales = TRANSFORMS.get(method)(Settings(method=method)).scales(
        [weight], [make_codec(FOUR_BITS)], statistics_of(x), Repeat(1, 1), workers
    )
    assert bool(power_of_two(scales).isfinite().all())
    x.zero_()
    scales = TRANSFORMS.get(method)(Settings(method=method)).scales(
        [weight], [make_codec(FOUR_BITS)], statistics_of(x), Repeat(1, 1), workers
    )
    assert bool(power_of_two(scales).isfinite().all())


def test_threads_do_not_change_scales(method):
    weight = torch.randn(3000, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for threads in (1, 2, 3):
        pool = Workers(threads)
        results.append(
            TRANSFORMS.get(method)(Settings(method=method)).scales(
                [weight], [make_codec(FOUR_BITS)], statistics_of(hidden().flatten(0, 1)), Repeat(1, 1), pool
            )
        )
        pool.close()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_repeat_copies_a_head_to_those_that_it_feeds():
    repeat = Repeat(heads=2, times=3)
    scales = torch.arange(8.0)  # 2 heads of 4 channels
    wide = repeat(scales)
    assert wide.tolist() == [*range(4)] * 3 + [*range(4, 8)] * 3
    assert torch.equal(repeat.reduce(wide), scales)
    assert repeat.reduce(torch.arange(24.0))[0] == (0 + 4 + 8) / 3


# SmoothQuant


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
def test_smoothquant_is_its_formula(alpha, workers):
    """Equation 4 in plain Python, over all linears that read the channels together."""
    x = hidden(width=8).flatten(0, 1)
    weights = [torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (5, 9)]
    settings = Settings(method="smoothquant", strength=alpha)
    scales = SmoothQuant(settings).scales(weights, [make_codec(FOUR_BITS)] * 2, statistics_of(x), Repeat(1, 1), workers)
    exponent = 0.5 if alpha is None else alpha
    for channel in range(8):
        activation = max(abs(float(v)) for v in x[:, channel])
        weight = max(abs(float(v)) for w in weights for v in w[:, channel])
        assert float(scales[channel]) == pytest.approx(activation**exponent / weight ** (1 - exponent), rel=1e-5)


# AWQ


def output_error(weight, codec, scales, sample) -> float:
    scaled = weight * scales
    rounded = codec.encoder(scaled, scaled, refit=False).round_all(scaled) / scales
    return float((sample.double() @ (rounded - weight).double().T).square().sum())


def test_awq_is_never_worse_than_no_scaling_and_best_of_its_exponents(workers):
    codec, gained = make_codec(FOUR_BITS), 0
    for seed in range(5):
        x = hidden(seed=seed).flatten(0, 1)
        weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
        scales = Awq(Settings(method="awq")).scales([weight], [codec], statistics_of(x), Repeat(1, 1), workers)
        assert torch.equal(scales, power_of_two(scales)), "what is searched is what will be folded"
        found = output_error(weight, codec, scales, x)
        none = output_error(weight, codec, torch.ones(64), x)
        size = x.abs().mean(0)
        size /= size.log().mean().exp()
        tried = [output_error(weight, codec, power_of_two(size ** (step / STEPS)), x) for step in range(STEPS)]
        assert found == pytest.approx(min(tried), rel=1e-5)
        assert found <= none
        gained += found < 0.95 * none
    assert gained >= 3, "outlier channels of the inputs: scaling must pay"


def test_awq_takes_no_strength():
    with pytest.raises(UserError, match="awq searches its exponent and takes no strength"):
        Awq(Settings(method="awq", strength=0.5))


def test_unknown_transform_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown transform 'zap'; known: awq, hadamard, smoothquant"):
        TRANSFORMS.get("zap")


# Rotations


@pytest.fixture(params=[name for name in TRANSFORMS.names() if issubclass(TRANSFORMS.get(name), InputRotation)])
def rotation(request):
    return TRANSFORMS.get(request.param)(Settings(method=request.param))


@pytest.mark.parametrize("columns", [1, 7, 8, 64, 96, 100])
def test_signs_are_packed_bits_of_the_seed_and_the_place(rotation, columns):
    first = rotation.signs(columns, 0, 3, "mlp input")
    assert (first.shape, first.dtype) == ((-(-columns // 8),), torch.uint8)
    assert torch.equal(rotation.signs(columns, 0, 3, "mlp input"), first)
    if columns > 32:
        for other in ((1, 3, "mlp input"), (0, 4, "mlp input"), (0, 3, "mlp output")):
            assert not torch.equal(rotation.signs(columns, *other), first)


def test_signs_turn_about_half_of_the_columns(rotation):
    """4096 fair coins: five standard deviations are 160."""
    factors = unpack_signs(rotation.signs(4096, 0, 0, "attention input"), 4096)
    assert set(factors.tolist()) == {1.0, -1.0}
    assert abs(int(factors.sum())) <= 2 * 160


def test_a_rotation_takes_no_strength():
    with pytest.raises(UserError, match="hadamard rotates all the way and takes no strength"):
        TRANSFORMS.get("hadamard")(Settings(method="hadamard", strength=0.5))
