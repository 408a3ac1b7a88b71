"""Bit packing against three oracles: the sentence of its docstring in slow Python, its own plain version, compressed-tensors."""

import pytest
import torch

from quern.codecs.packing.bits import pack, unpack, unpack_any, words_per_row

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (2, 3), (1, 31), (3, 32), (3, 33), (17, 63), (16, 64), (5, 65), (2, 100), (33, 257)]


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + columns + bits)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def packed_slowly(row: list[int], bits: int) -> list[int]:
    """Code i at bits [i b, (i + 1) b) of one large number, which is then cut into words; in Python's own integers."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    count = (len(row) * bits + 31) // 32
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@pytest.mark.parametrize("bits", WIDTHS)
def test_layout_is_what_the_docstring_says(bits):
    for shape in SHAPES:
        codes = random_codes(*shape, bits)
        words = pack(codes, bits)
        assert words.dtype == torch.int32
        assert words.shape == (shape[0], words_per_row(shape[1], bits))
        assert words.tolist() == [packed_slowly(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_is_the_inverse_and_equals_its_plain_version(bits):
    for shape in SHAPES:
        codes = random_codes(*shape, bits)
        words = pack(codes, bits)
        for result in (unpack(words, bits, shape[1]), unpack_any(words, bits, shape[1])):
            assert result.dtype == torch.uint8
            assert torch.equal(result, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_words_are_read_alike(bits):
    """Arbitrary words, the unused bits included."""
    generator = torch.Generator().manual_seed(bits)
    for columns in (64, 63, 33, 1):
        words = torch.randint(-(2**31), 2**31, (7, words_per_row(columns, bits)), generator=generator).to(torch.int32)
        assert torch.equal(unpack(words, bits, columns), unpack_any(words, bits, columns))


@pytest.mark.parametrize("bits", WIDTHS)
def test_strides_and_empty_rows_do_not_matter(bits):
    codes = random_codes(6, 40, bits)
    words = pack(codes, bits)
    assert torch.equal(pack(codes.T.contiguous().T, bits), words)
    assert torch.equal(unpack(words.T.contiguous().T, bits, 40), codes)
    one_word = pack(random_codes(5, 32 // bits, bits), bits)  # (5, 1): its second stride may be anything
    assert torch.equal(unpack(one_word.T.contiguous().T, bits, 32 // bits), random_codes(5, 32 // bits, bits))
    assert unpack(words[:1, :1].as_strided((1, 1), (7, 5)), bits, 32 // bits).shape == (1, 32 // bits)
    assert unpack(words[:0], bits, 40).shape == (0, 40)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_not_touched_and_unused_bits_are_zero(bits):
    codes = torch.full((2, 33), (1 << bits) - 1, dtype=torch.uint8)
    words = pack(codes, bits)
    assert bool((codes == (1 << bits) - 1).all())
    used = 33 * bits - 32 * (words.shape[1] - 1)
    assert int(words[0, -1]) & 0xFFFFFFFF == (1 << used) - 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_packs_the_same(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="not installed")
    for shape in SHAPES:
        codes = random_codes(*shape, bits)
        signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        assert torch.equal(helpers.pack_to_int32(signed, bits), pack(codes, bits)), shape
        assert torch.equal(helpers.unpack_from_int32(pack(codes, bits), bits, torch.Size(shape)), signed)
