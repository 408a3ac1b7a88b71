"""Codes for values that lie on a grid: found wherever there is one, by trying every scale that there is, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from schemes import gaussian, make_codec
from torch import Tensor

from quern.codecs.fitting import exact
from quern.codecs.fitting.exact import exact_codes, exact_floats

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def every_scale(dtype: torch.dtype) -> Tensor:
    """All positive finite numbers of a dtype of 16 bits, float32."""
    numbers = torch.arange(1, 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return numbers[numbers.isfinite()]


def has_grid(values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> bool:
    """Whether ``values`` ``(width,)`` are codes less a zero point times some scale: every scale is tried, of either sign."""
    scales, levels = every_scale(dtype)[:, None], (1 << bits) - 1
    whole = (values.double() / scales.double()).round()
    fits = (whole.float() * scales == values).all(1)
    low, high = whole.amin(1), whole.amax(1)
    if symmetric:
        least = (levels + 1) // 2
        return bool((fits & (((low >= -least) & (high < least)) | ((high <= least) & (low > -least)))).any())
    return bool((fits & (high.clamp(min=0) - low.clamp(max=0) <= levels)).any())


def decoded(found: exact.Exact) -> Tensor:
    return (found.codes.float() - found.zero[:, None]) * found.scale[:, None]


def assert_exact(values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> exact.Exact:
    found = exact_codes(values, bits, symmetric, dtype)
    assert found is not None
    assert torch.equal(decoded(found), values)
    assert torch.equal(found.scale.to(dtype).float(), found.scale)
    assert int(found.codes.max()) < 1 << bits
    assert bool(((found.zero >= 0) & (found.zero < 1 << bits) & (found.zero == found.zero.round())).all())
    if symmetric:
        assert bool((found.zero == 1 << (bits - 1)).all())
    return found


def sets(bits: int, symmetric: bool, dtype: torch.dtype, seed: int, count: int = 24, width: int = 5) -> Tensor:
    """Few values on a grid each, in some sets as multiples of each other, in some with one value that is off it."""
    generator = torch.Generator().manual_seed(seed)
    levels = (1 << bits) - 1
    zero = torch.full((count, 1), (levels + 1) // 2)
    if not symmetric:
        zero = torch.randint(0, levels + 1, (count, 1), generator=generator)
    number = torch.randint(0, levels + 1, (count, width), generator=generator) - zero
    scale = every_scale(dtype)
    scale = scale[torch.randint(len(scale) // 4, 3 * len(scale) // 4, (count, 1), generator=generator)]
    values = number.float() * scale
    values[::4] = values[::4, :1]  # one value alone
    values[1::4, 1:] *= torch.tensor([1.0, 0.5, 1.5, 1 + 2.0**-12])  # half steps, and what is hardly off
    values[2::8] *= -1
    return values


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_grid_is_found_where_there_is_one(name, bits, symmetric):
    dtype, answers = DTYPES[name], []
    for values in sets(bits, symmetric, dtype, seed=bits):
        answers.append(has_grid(values, bits, symmetric, dtype))
        if answers[-1]:
            assert_exact(values[None], bits, symmetric, dtype)
        else:
            assert exact_codes(values[None], bits, symmetric, dtype) is None
    assert 3 <= sum(answers) <= 21


@pytest.mark.parametrize("exponent", [-135, -110, -20, 0, 90])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_with_float32_scales_were_rounded(bits, exponent):
    """Scales of 24 bits times numbers of up to 8, and in the smallest sizes (below 2^-126) of what bits float32 has left there."""
    generator = torch.Generator().manual_seed(bits)
    scale = (1 + torch.rand(400, 1, generator=generator)) * 2.0**exponent
    number = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (400, 6), generator=generator)
    assert_exact(number * scale, bits, True, torch.float32)
    off = number * scale
    off[7, 3] += 2.0**exponent / 3
    assert exact_codes(off, bits, True, torch.float32) is None


@pytest.mark.parametrize("number", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_floating_point_numbers_of_eight_bits(name, number, monkeypatch):
    """Any of them, least and greatest too; sets that use few of them, and not the largest; zeros; one set of many values."""
    dtype, generator = DTYPES[name], torch.Generator().manual_seed(0)
    every = torch.arange(256).to(torch.uint8).view(number).float()
    every = every[every.isfinite()]
    numbers = every[torch.randint(len(every), (500, 7), generator=generator)]
    numbers[::3] = numbers[::3, :1]
    numbers[5] = 0
    scale = (
        ((1 + torch.rand(500, 1, generator=generator)) * 2.0 ** torch.randint(-10, -4, (500, 1), generator=generator))
        .to(dtype)
        .float()
    )
    for values in (numbers * scale, (every * scale[0])[torch.randint(len(every), (1, 3000), generator=generator)]):
        found = exact_floats(values, number, dtype)
        assert found is not None
        assert torch.equal(found.codes.view(number).float() * found.scale[:, None], values)
        assert torch.equal(found.scale.to(dtype).float(), found.scale)
        assert not bool(found.zero.any())
        off = values.clone()
        off[0, :2] = torch.tensor([1, 1 + 2.0**-7])
        assert exact_floats(off, number, dtype) is None
        monkeypatch.setattr(exact, "VALUES_AT_ONCE", 1000)


def test_values_that_say_little():
    """Zeros of either sign; a single value, also one whose step float16 has only a part of; numbers with a common divisor."""
    zeros = torch.tensor([[0.0, -0.0, 0.0], [-0.0, -0.0, -0.0]])
    for dtype in DTYPES.values():
        assert_exact(zeros, 4, True, dtype)
        assert_exact(zeros, 4, False, dtype)
    assert bool((assert_exact(zeros, 4, True, torch.float16).scale > 0).all())
    third = torch.tensor([[3 * (1 + 2.0**-10), 0.0, 3 * (1 + 2.0**-10)]])  # twelve bits, a third of which has eleven
    assert float(assert_exact(third, 4, True, torch.float16).scale) == 1 + 2.0**-10
    assert exact_codes(third, 2, True, torch.float16) is None
    even = assert_exact(torch.tensor([[-6.0, 4.0, 2.0]]), 4, True, torch.float16)
    assert (float(even.scale), even.codes.tolist()) == (2.0, [[5, 10, 9]])


def test_the_side_that_a_symmetric_grid_lacks_is_reached_upside_down():
    found = assert_exact(torch.tensor([[8.0, -7.0, 0.0, 1.0]]), 4, True, torch.float16)
    assert float(found.scale) == -1
    assert exact_codes(torch.tensor([[8.0, -8.0, 1.0]]), 4, True, torch.float16) is None
    assert_exact(torch.tensor([[8.0, -7.0, 0.0, 1.0]]), 4, False, torch.float16)


def test_one_set_among_many_that_has_none_is_seen():
    values = torch.randint(-8, 8, (5000, 64), generator=torch.Generator().manual_seed(0)).float()
    assert_exact(values, 4, True, torch.float16)
    values[4321, 17] = 0.3
    assert exact_codes(values, 4, True, torch.float16) is None


def test_a_large_set_is_looked_at_in_pieces(monkeypatch):
    """Those of one set of a million values, and of the same in pieces of a few, are the same codes."""
    values = torch.randint(-100, 28, (1, 1 << 20), generator=torch.Generator().manual_seed(0)) * 2.0**-7
    whole = assert_exact(values, 8, True, torch.float16)
    monkeypatch.setattr(exact, "VALUES_AT_ONCE", 1 << 21)
    at_once = assert_exact(values, 8, True, torch.float16)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, at_once, strict=True))
    monkeypatch.undo()
    assert exact_codes(gaussian(1, 1 << 19), 8, True, torch.float16) is None
    values[0, 12345] = 3.14
    assert exact_codes(values, 8, True, torch.float16) is None


@pytest.mark.parametrize(
    "scheme",
    [
        {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 64, "scale_dtype": "float16"},
        {"bits": 8, "symmetric": True, "granularity": "channel", "group_size": None, "scale_dtype": "bfloat16"},
        {"bits": 3, "symmetric": True, "granularity": "group", "group_size": 128, "scale_dtype": "float32"},
    ],
    ids=lambda scheme: scheme["granularity"],
)
def test_the_scheme_of_given_values_is_found(scheme):
    """Scales cover both ends of a row or group here, so that nothing narrower or finer does."""
    codec = make_codec({"codec": "integer", **scheme}, observer="min_max")
    weight = gaussian(32, 256) * (2.0**-20 if scheme["scale_dtype"] == "bfloat16" else 1)  # below what float16 reaches
    values = codec.encoder(weight, weight, refit=False).round_all(weight)
    asked = make_codec({"codec": "integer", "bits": 2, "granularity": "tensor"})
    found = asked.exact_scheme(values)
    assert found is not None
    assert {key: found.to_json()[key] for key in scheme} == scheme
    assert asked.exact_scheme(weight) is None
