"""Codes of 2, 3 and 4 bits as kernels with tables want them."""

import numpy as np
import packed_matrices
import pytest
import torch

from quern.codecs.packing import planes

COLUMNS = (1, 3, 4, 15, 16, 17, 31, 33, 100, 255, 256, 257, 300, 512, 700)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", COLUMNS)
def test_codes_come_back(bits, columns):
    codes = torch.randint(
        0, 1 << bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns)
    )
    words = planes.pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, planes.words_per_row(columns, bits))
    assert torch.equal(planes.unpack(words, bits, columns), codes)
    assert torch.equal(planes.unpack(words[2:3], bits, columns), codes[2:3])
    assert planes.unpack(words[:0], bits, columns).shape == (0, columns)


@pytest.mark.parametrize("columns", COLUMNS)
def test_three_bits_lie_where_kernels_read_them(columns):
    codes = np.random.default_rng(columns).integers(0, 8, (3, columns), dtype=np.uint8)
    expected = packed_matrices.pack_three(codes)
    assert planes.pack(torch.from_numpy(codes), 3).numpy().view(np.uint8).tolist() == expected.tolist()
