"""Codes in ggml's blocks stand for the values that the codec decodes, by the decoders of the package gguf."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from schemes import gaussian, make_codec

from quern.codecs.base import CODECS
from quern.codecs.packing import ggml
from quern.codecs.packing.ggml import GgmlForm
from quern.core.errors import UserError

SHAPE = (40, 160)
SHARED = {
    "tensor": {"granularity": "tensor"},
    "channel": {"granularity": "channel"},
    "group 32": {"granularity": "group", "group_size": 32},
    "group 96": {"granularity": "group", "group_size": 96},
    "block 32": {"granularity": "block", "group_size": 32},
}


def values_of(kind: str, data: torch.Tensor) -> np.ndarray:
    return dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])


def rounded(codec, weight):
    encoder = codec.encoder(weight, weight, refit=False)
    values = encoder.round_all(weight)
    return values, codec.join([encoder.parts()])


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("bits", "kind"), [(1, "Q4_0"), (2, "Q4_0"), (3, "Q4_0"), (4, "Q4_0"), (5, "Q5_0"),
                                            (6, "Q8_0"), (7, "Q8_0"), (8, "Q8_0")])  # fmt: skip
def test_symmetric_integers_keep_every_value(bits, kind, shared):
    codec = make_codec({"codec": "integer", "bits": bits, **SHARED[shared]})
    values, parts = rounded(codec, gaussian(*SHAPE))
    form, blocks = codec.ggml(SHAPE), codec.ggml_blocks(SHAPE, parts)
    assert form == GgmlForm(kind)
    assert (blocks.rounded, blocks.of) == (0, 40 * 5)
    assert np.array_equal(values_of(kind, blocks.data), values.numpy())
    assert blocks.data.shape == (40, 5 * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])


def test_mxfp4_keeps_every_value():
    codec = make_codec({"codec": "mxfp4"})
    values, parts = rounded(codec, gaussian(*SHAPE))
    assert codec.ggml(SHAPE) == GgmlForm("MXFP4")
    assert np.array_equal(values_of("MXFP4", codec.ggml_blocks(SHAPE, parts).data), values.numpy())


@pytest.mark.parametrize(("bits", "kind"), [(1, "Q4_1"), (3, "Q4_1"), (4, "Q4_1"), (5, "Q5_1")])
def test_minimums_are_rounded_once_and_counted(bits, kind):
    """Of value = code x scale + minimum only the minimum moves: by half a unit of float16's last place at most."""
    codec = make_codec({"codec": "integer", "bits": bits, "symmetric": False, "granularity": "group", "group_size": 32})
    weight = gaussian(*SHAPE)
    values, parts = rounded(codec, weight)
    stored, blocks = codec.restored(SHAPE, parts), codec.ggml_blocks(SHAPE, parts)
    assert codec.ggml(SHAPE).notes
    minimum = -stored.zero * stored.scale
    off = (minimum.half().float() - minimum).abs()
    found = torch.from_numpy(values_of(kind, blocks.data))
    moved = (found - values).abs().view(40, 5, 32).amax(-1)
    # Beside the minimum one float32 sum of what was a product: half a unit of the last place of the values.
    bound = off + 2.0**-23 * (values.abs() + weight.abs().amax()).view(40, 5, 32).amax(-1)
    assert bool((moved <= bound).all())
    assert blocks.rounded == int((off > 0).sum())
    assert blocks.of == 2 * 40 * 5


def test_scales_of_other_dtypes_are_rounded_and_counted():
    codec = make_codec(
        {"codec": "integer", "bits": 4, "granularity": "group", "group_size": 32, "scale_dtype": "float32"}
    )
    values, parts = rounded(codec, gaussian(*SHAPE))
    blocks = codec.ggml_blocks(SHAPE, parts)
    assert 0 < blocks.rounded <= blocks.of == 200
    found = values_of("Q4_0", blocks.data)
    assert not np.array_equal(found, values.numpy())
    assert np.abs(found - values.numpy()).max() <= 2.0**-11 * np.abs(values.numpy()).max()
    assert "float32 become float16" in codec.ggml(SHAPE).notes[0]


def test_scales_beyond_float16_are_refused():
    codec = make_codec(
        {"codec": "integer", "bits": 4, "granularity": "group", "group_size": 32, "scale_dtype": "float32"}
    )
    _, parts = rounded(codec, gaussian(*SHAPE) * 1e6)
    with pytest.raises(UserError, match="beyond float16"):
        codec.ggml_blocks(SHAPE, parts)


@pytest.mark.parametrize(
    ("scheme", "shape", "why"),
    [
        ({"bits": 4, "group_size": 32}, (8, 100), "no whole blocks of 32"),
        ({"bits": 4, "group_size": 16}, SHAPE, "scales for 16 inputs each"),
        ({"bits": 4, "group_size": 48}, SHAPE, "scales for 48 inputs each"),
        ({"bits": 8, "symmetric": False, "group_size": 32}, SHAPE, "8 bits with zero points"),
    ],
)
def test_what_has_no_block_says_why(scheme, shape, why):
    assert why in make_codec({"codec": "integer", **scheme}).ggml(shape)


@pytest.mark.parametrize("name", CODECS.names())
def test_every_codec_has_a_type_or_says_that_it_has_none(name):
    scheme = {"codec": name, "granularity": "channel"} if name == "trellis" else {"codec": name}
    form = make_codec(scheme).ggml((64, 256))
    assert isinstance(form, GgmlForm) or name in form


def test_codes_lie_as_the_header_of_ggml_says():
    """Halves of a block are low and high nibbles, fifth bits are one word: by hand, for codes 0 to 31."""
    codes = torch.arange(32, dtype=torch.uint8)[None, None]
    assert ggml.nibbles(codes)[0, 0].tolist() == [low | low << 4 for low in range(16)]
    assert ggml.fifth_bits(codes)[0, 0].tolist() == [0, 0, 255, 255]
    assert ggml.half_bytes(torch.tensor([[1.0]]))[0, 0].tolist() == [0x00, 0x3C]
