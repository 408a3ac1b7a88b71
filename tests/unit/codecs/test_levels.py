"""Fixed values: NF4, powers of two, 4-bit and 8-bit floating point, each against what its specification says."""

import pytest
import torch
from schemes import make_codec

from quern.codecs.float4 import E2M1
from quern.codecs.log import powers
from quern.codecs.nf4 import Nf4Codec, normal_float

# Dettmers et al. 2023, appendix E.
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def rounded(weight: torch.Tensor, **scheme):
    codec = make_codec(scheme)
    encoder = codec.encoder(weight, weight, refit=False)
    found = encoder.round_all(weight)
    return found, encoder.parts(), codec


def gaussian(rows=64, columns=4096, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_nf4_has_the_published_values():
    # Published as float32 numbers of quantiles that scipy computed.
    assert normal_float() == pytest.approx(PUBLISHED, abs=2e-7)
    assert max(abs(level / 127 - value) for level, value in zip(Nf4Codec.levels, PUBLISHED, strict=True)) < 1 / 254


def test_whole_numbers_cost_nf4_nothing():
    """Rounding the values to a 127th moves the loss by the square of at most 1/254 of the range, against .01 of it."""
    weight = gaussian(16)
    found, parts, _ = rounded(weight, codec="nf4", granularity="channel", observer="min_max")
    scaled = weight / (parts["scale"].float() * 127)
    table = torch.tensor(PUBLISHED)
    exact = table[(scaled[..., None] - table).abs().argmin(-1)]
    ours, theirs = (found - weight).square().mean(), ((exact - scaled) * parts["scale"].float() * 127).square().mean()
    assert float(ours / theirs) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_log_values_are_signed_powers_of_two(bits):
    levels = powers(bits)
    half = 1 << (bits - 1)
    assert len(set(levels)) == 2 * half - 1
    assert levels[half - 1] == levels[-1] == 0
    assert all(level == -levels[code + half] for code, level in enumerate(levels[:half]))
    assert [levels[code] / levels[code + 1] for code in range(half - 2)] == [2.0] * (half - 2)
    found, parts, _ = rounded(gaussian(8, 256), codec="log", bits=bits, granularity="channel")
    ratios = found / (parts["scale"].float() * levels[0])
    assert bool((ratios.abs().log2() == ratios.abs().log2().round()).logical_or(ratios == 0).all())
    if bits > 3:  # what shifts cannot say is at most a third off: between 2/3 and 4/3 of a power
        clear = ratios.abs() > 2.0 ** (3 - half)
        assert float((found / gaussian(8, 256)).sub(1).abs()[clear & (ratios.abs() < 1)].max()) <= 1 / 3 + 1e-6


def test_mxfp4_against_another_reader():
    gguf = pytest.importorskip("gguf", reason="gguf reads MXFP4 blocks")
    weight = gaussian(5, 96) * torch.logspace(-3, 3, 5)[:, None]
    found, parts, _ = rounded(weight, codec="mxfp4")
    octets = parts["codes"].view(torch.uint8).view(5, 3, 16)
    low, high = octets & 15, octets >> 4  # columns 2 i and 2 i + 1; a block of ggml has columns i and i + 16 in byte i
    codes = torch.stack([low, high], dim=-1).view(5, 3, 32)
    theirs = torch.cat([parts["scale"][..., None], codes[..., :16] | codes[..., 16:] << 4], dim=-1)
    kind = gguf.GGMLQuantizationType.MXFP4
    decoded = gguf.quants.dequantize(theirs.reshape(5, -1).numpy(), kind)
    assert torch.equal(torch.from_numpy(decoded), found)


def test_float4_values_are_those_of_both_specifications():
    assert [level / 2 for level in E2M1] == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize("factor", [1.0, 2.0**-20, 3e5])
def test_scales_of_mxfp4_are_powers_of_two_that_clip_nothing(factor):
    weight = gaussian(32, 320) * factor
    found, parts, codec = rounded(weight, codec="mxfp4", observer="min_max")
    scale = codec.read_scale(parts)
    assert bool((scale.log2() == scale.log2().round()).all())
    largest = weight.view(32, 10, 32).abs().amax(-1)
    assert bool((6 * scale >= largest).all())
    assert bool((3 * scale < largest).all())
    assert bool(((found - weight).abs() <= scale.repeat_interleave(32, 1)).all())


def test_nvfp4_scales_are_e4m3_numbers_of_one_scale():
    weight = gaussian(32, 320) * torch.logspace(-3, 0, 32)[:, None]
    found, parts, codec = rounded(weight, codec="nvfp4", observer="min_max")
    assert parts["scale"].dtype == torch.float8_e4m3fn
    assert float(parts["tensor_scale"]) == pytest.approx(float(weight.abs().max()) / (6 * 448), rel=1e-6)
    scale = codec.read_scale(parts)
    largest = weight.view(32, 20, 16).abs().amax(-1)
    normal = largest / float(parts["tensor_scale"]) / 6 >= 2.0**-6  # E4M3 has three bits of fraction from there on
    assert bool((6 * scale / largest).sub(1).abs()[normal].le(1 / 16).all())
    assert float((found - weight).square().mean() / weight.square().mean()) < 0.02


@pytest.mark.parametrize(("variant", "largest", "fraction"), [("e4m3", 448.0, 3), ("e5m2", 57344.0, 2)])
def test_float8_keeps_its_bits_of_fraction(variant, largest, fraction):
    weight = gaussian(16, 512)
    found, parts, _ = rounded(weight, codec="float8", variant=variant, observer="min_max")
    scaled = weight / parts["scale"]
    assert float(scaled.abs().max()) == pytest.approx(largest, rel=1e-6)
    normal = scaled.abs() >= 2.0**-6
    assert float((found / weight).sub(1).abs()[normal].max()) <= 2.0 ** -(fraction + 1) * 1.0001


def test_blocks_share_a_scale():
    weight = gaussian(80, 96)
    for scheme in ({"codec": "float8"}, {"codec": "integer", "bits": 8}, {"codec": "nf4"}):
        found, parts, codec = rounded(weight, **scheme, granularity="block", group_size=32, observer="min_max")
        assert parts["scale"].shape == (3, 3)
        last = weight[64:, 32:64]
        largest = float(parts["scale"][2, 1]) * codec.grid.largest
        expected = float(last.abs().max()) * (2 if scheme["codec"] == "integer" else 1)
        assert largest == pytest.approx(expected, rel=1e-3)
        assert torch.equal(codec.decode_rows((80, 96), parts, torch.tensor([79, 3, 33])), found[[79, 3, 33]])
