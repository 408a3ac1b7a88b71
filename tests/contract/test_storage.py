"""What entropy-coded storage promises of every codec: its parts come back bit by bit."""

import pytest
import torch
from schemes import ALL, gaussian, make_codec, scheme_id

from quern.checkpoint.files import InputFile
from quern.checkpoint.safetensors_file import TensorInfo
from quern.codecs.base import CODECS
from quern.core.machine.parallel import Workers
from quern.formats.entropy import entropy, symbols

pytest.importorskip("zstandard", reason="zstandard is not installed")

SHAPE = (48, 200)
"""Rows of codes end within a word, and within a symbol."""


@pytest.fixture(autouse=True)
def everything_is_coded(monkeypatch):
    """However small it is and whatever that gains; in several chunks."""
    monkeypatch.setattr(symbols, "CHUNK", 1024)
    monkeypatch.setattr(entropy, "LEAST_BYTES", 1)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    alike = (left.dtype, left.shape) == (right.dtype, right.shape)
    return alike and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def parts_of(scheme) -> dict[str, torch.Tensor]:
    codec, weight = make_codec(scheme, observer="min_max"), gaussian(*SHAPE)
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.round_all(weight)
    return codec.join([encoder.parts()])


@pytest.mark.parametrize("scheme", ALL, ids=scheme_id)
def test_every_part_survives(scheme, tmp_path):
    codec, workers = make_codec(scheme), Workers(1)
    widths, parts = codec.code_bits(), parts_of(scheme)
    assert set(widths) <= set(parts)
    for name, part in parts.items():
        coded = entropy.encode(part, widths.get(name, 8))
        if coded is None:
            continue
        (tmp_path / name).write_bytes(coded[0].numpy().tobytes())
        with InputFile(tmp_path / name) as file:
            info = TensorInfo("U8", tuple(coded[0].shape), 0, file.size)
            assert same(entropy.CodedTensor(file, name, info, coded[1]).read(workers), part), name


@pytest.mark.parametrize("name", CODECS.names())
def test_some_part_of_every_codec_becomes_smaller(name):
    """Or the test above would compare nothing; of trellis codes it is the table or the scales."""
    mine = [scheme for scheme in ALL if scheme["codec"] == name]
    assert any(entropy.encode(part, 8) is not None for scheme in mine for part in parts_of(scheme).values())
