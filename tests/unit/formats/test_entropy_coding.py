"""Entropy-coded tensors: the same tensor comes back bit for bit, in few bytes, and nothing else is taken for it."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.files import InputFile
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo
from quern.codecs.packing import bits as packing
from quern.core.errors import BadFileError
from quern.core.machine.parallel import Workers
from quern.formats.entropy import entropy, symbols
from quern.formats.entropy.coded_source import CodedSource, parse_storage, storage_json
from quern.formats.entropy.entropy import CodedTensor, encode
from quern.formats.entropy.symbols import Coding, entropy_bits, merge, parse_coding, split

zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")

NAME = "model.layers.0.mlp.up_proj.codes"
GOOD = {"dtype": "I32", "shape": [64, 96], "planes": 1, "width": 6, "checksum": 7}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Many chunks in a small tensor."""
    monkeypatch.setattr(symbols, "CHUNK", 4096)


def octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def codes(bits: int, shape=(96, 320), spread: float = 0.15, seed: int = 0) -> torch.Tensor:
    """Packed codes of Gaussian weights."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * spread * (1 << bits) + (1 << bits - 1)
    return packing.pack(values.round().clamp(0, (1 << bits) - 1).to(torch.uint8), bits)


def stored(coded: bytes, folder: Path) -> InputFile:
    """A file that holds ``coded`` behind seven other bytes."""
    path = folder / "file"
    path.write_bytes(b"x" * 7 + coded)
    return InputFile(path)


def read(coded: bytes, coding: Coding, folder: Path, threads: int = 1) -> torch.Tensor:
    workers = Workers(threads)
    try:
        with stored(coded, folder) as file:
            info = TensorInfo("U8", (len(coded),), 7, 7 + len(coded))
            return CodedTensor(file, NAME, info, coding).read(workers)
    finally:
        workers.close()


def in_bits(raw: bytes, width: int) -> list[int]:
    """Symbols by the page's words: bits in order, ``width`` of them a symbol, zeros at the end."""
    number, count = int.from_bytes(raw, "little"), -(-8 * len(raw) // width)
    return [number >> width * place & (1 << width) - 1 for place in range(count)]


@pytest.mark.parametrize("width", [5, 6, 7, 8])
@pytest.mark.parametrize("size", [1, 4, 5, 6, 7, 8, 15, 16, 17, 100])
def test_symbols_are_pieces_of_the_stream_of_bits(width, size):
    raw = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    coding = Coding("U8", (size,), 1, width, 0)
    (symbols,) = split(raw, coding)
    assert symbols.tolist() == in_bits(raw.tobytes(), width)
    assert len(symbols) == coding.symbols(size)
    out = np.empty_like(raw)
    merge([symbols], coding, out)
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_planes_hold_exponents_above_mantissas(dtype):
    words = torch.randint(-(2**15), 2**15, (33,), generator=torch.Generator().manual_seed(1), dtype=torch.int16)
    tensor = words.view(dtype) if dtype.itemsize == 2 else words.float()
    raw = np.frombuffer(octets(tensor), np.uint8)
    coding = Coding(
        {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype], (33,), dtype.itemsize, 8, 0
    )
    planes = split(raw, coding)
    width = 8 * dtype.itemsize
    numbers = [
        int.from_bytes(raw[at : at + dtype.itemsize].tobytes(), "little") for at in range(0, raw.size, dtype.itemsize)
    ]
    turned = [(number << 1 | number >> width - 1) & (1 << width) - 1 for number in numbers]
    for place, plane in enumerate(planes):
        assert plane.tolist() == [number >> width - 8 * (place + 1) & 255 for number in turned]
    if dtype != torch.float16:  # the exponent of IEEE 754 and nothing else
        exponents = [number >> width - 9 & 255 for number in numbers]
        assert planes[0].tolist() == exponents
    out = np.empty_like(raw)
    merge(planes, coding, out)
    assert np.array_equal(out, raw)


@pytest.mark.parametrize("dtype", symbols.CODED)
def test_tensors_come_back_bit_for_bit(dtype, tmp_path):
    """Of every dtype that is coded; sizes that fill no chunk; NaN and infinities among the numbers."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3, 4999, generator=generator) * 4
    tensor = values.to(DTYPES[dtype])
    if dtype in symbols.PLANES:
        tensor[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    coded, coding = encode(tensor)
    assert (coded.dtype, coded.dim()) == (torch.uint8, 1)
    assert coded.numel() < tensor.nbytes
    assert parse_coding(json.loads(json.dumps(coding.to_json()))) == coding
    once, again = (read(octets(coded), coding, tmp_path, threads) for threads in (1, 3))
    for found in (once, again):
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert octets(found) == octets(tensor)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_every_width_come_back(bits, tmp_path):
    for shape in ((96, 320), (96, 333)):
        tensor = codes(bits, shape)
        before = octets(tensor)
        found = encode(tensor, bits)
        assert octets(tensor) == before
        if found is None:  # rows of 333 end within a symbol, and codes that are out of step may gain nothing
            assert (shape[1], bits) in ((333, 5), (333, 6), (333, 7))
            continue
        coded, coding = found
        assert coding.width == {2: 8, 3: 6, 4: 8}.get(bits, bits)
        assert octets(read(octets(coded), coding, tmp_path)) == before


def test_the_same_tensor_has_the_same_bytes():
    first, second = encode(codes(4), 4), encode(codes(4), 4)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def test_what_gains_nothing_stays_as_it_is():
    generator = torch.Generator().manual_seed(3)
    assert encode(codes(1), 1) is None
    assert encode(torch.randint(0, 256, (200, 200), generator=generator, dtype=torch.uint8)) is None
    assert encode(torch.zeros(entropy.LEAST_BYTES - 1, dtype=torch.uint8)) is None
    assert encode(torch.zeros(entropy.LEAST_BYTES, dtype=torch.uint8)) is not None
    assert encode(torch.zeros(10_000, dtype=torch.int64)) is None
    assert encode(torch.zeros(0, 7)) is None


def test_entropy_of_known_distributions():
    counts = np.zeros((1, 256), np.int64)
    counts[0, :4] = 5
    assert entropy_bits(counts, 8, 8) == pytest.approx(20 * 2)
    counts[0, :4] = [8, 4, 2, 2]  # Shannon's example: 1.75 bits a symbol
    assert entropy_bits(counts, 8, 8) == pytest.approx(16 * 1.75)
    pairs = np.zeros((1, 256), np.int64)
    pairs[0, 0b001_000] = 3  # codes 0 and 1, alternately: one bit each, though pairs have none
    assert entropy_bits(pairs, 6, 3) == pytest.approx(6)
    assert entropy_bits(pairs, 6, 6) == 0
    assert entropy_bits(np.concatenate([counts, counts]), 8, 8) == pytest.approx(2 * 16 * 1.75)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_coded_codes_take_what_their_entropy_says(bits, monkeypatch):
    """Within 3 %, and not less than 3 % below it: these codes are independent of each other."""
    monkeypatch.setattr(symbols, "CHUNK", 1 << 20)
    tensor = codes(bits, (512, 1024), spread=0.11)
    coded, _ = encode(tensor, bits)
    values = packing.unpack(tensor, bits, 1024)
    share = torch.bincount(values.reshape(-1).long()).double() / values.numel()
    least = float(-(share * share.clamp(min=1e-30).log2()).sum()) * values.numel()
    assert 0.97 < 8 * coded.numel() / least < 1.03


REFUSED = {
    "dtype": ["I64", "BOOL", None, ["F16"], "zap"],
    "shape": [[-1, 4], [0], [1 << 24, 1 << 24], [1.0], [True, 64], "64", None],
    "planes": [2, 0, True, "1", None],
    "width": [4, 9, 0, 6.0, True, None],
    "checksum": [-1, 1 << 32, "7", 1.5, None],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values], ids=str
)
def test_what_no_coding_can_be_is_refused(key, value):
    assert parse_coding(GOOD).shape == (64, 96)
    with pytest.raises(ValueError, match=r"dtype|shape|planes|symbols|checksum"):
        parse_coding({**GOOD, key: value})


def test_descriptions_have_their_keys_and_no_others():
    for wrong in ({}, {**GOOD, "zap": 1}, [], None, {key: GOOD[key] for key in ("dtype", "shape")}):
        with pytest.raises(ValueError, match="not described by exactly"):
            parse_coding(wrong)
    with pytest.raises(ValueError, match="8 with several planes"):
        parse_coding({**GOOD, "dtype": "BF16", "planes": 2})
    whole = storage_json({NAME: parse_coding(GOOD)})
    assert parse_storage(json.loads(json.dumps(whole))) == {NAME: parse_coding(GOOD)}
    for wrong in (None, {}, {**whole, "zap": 1}, {**whole, "tensors": []}):
        with pytest.raises(ValueError, match="coder and tensors"):
            parse_storage(wrong)
    with pytest.raises(ValueError, match="coded by 'ans'"):
        parse_storage({**whole, "coder": "ans"})
    with pytest.raises(ValueError, match=f"of coded tensor '{NAME}': it has dtype"):
        parse_storage({**whole, "tensors": {NAME: {**GOOD, "dtype": "I64"}}})


@pytest.fixture
def good():
    tensor = codes(3)
    coded, coding = encode(tensor, 3)
    return tensor, octets(coded), coding


def frames_of(coded: bytes, coding: Coding) -> list[bytes]:
    count = -(-coding.symbols(coding.size) // symbols.CHUNK) * coding.planes
    ends = 4 * count + np.cumsum(np.frombuffer(coded[: 4 * count], "<u4"), dtype=int)
    return [coded[begin:end] for begin, end in zip([4 * count, *ends], ends, strict=False)]


def with_frames(frames: list[bytes], coding: Coding) -> tuple[bytes, Coding]:
    """Coded bytes of ``frames`` with a checksum that fits them: a hostile writer's."""
    table = np.array([len(frame) for frame in frames], "<u4").tobytes()
    checksum = zlib.crc32(b"".join(frame[-4:] for frame in frames))
    return b"".join([table, *frames]), Coding(coding.dtype, coding.shape, coding.planes, coding.width, checksum)


def refused(coded: bytes, coding: Coding, folder: Path, match: str) -> None:
    with pytest.raises(BadFileError, match=match) as caught:
        read(coded, coding, folder)
    assert NAME in str(caught.value)
    assert str(folder) in str(caught.value)


def test_frames_put_together_again_are_read(good, tmp_path):
    """What the cases below change is otherwise right."""
    tensor, coded, coding = good
    frames = frames_of(coded, coding)
    assert len(frames) > 2
    assert with_frames(frames, coding) == (coded, coding)
    assert octets(read(coded, coding, tmp_path)) == octets(tensor)


def test_swapped_frames_are_refused(good, tmp_path):
    _, coded, coding = good
    frames = frames_of(coded, coding)
    frames[0], frames[1] = frames[1], frames[0]
    swapped, _ = with_frames(frames, coding)
    refused(swapped, coding, tmp_path, "has another checksum")


def test_another_tensors_bytes_are_refused(good, tmp_path):
    _, _, coding = good
    other, described = encode(codes(3, seed=1), 3)
    assert described.shape == coding.shape
    refused(octets(other), coding, tmp_path, "has another checksum")


def test_wrong_tables_are_refused(good, tmp_path):
    _, coded, coding = good
    for place, value in ((0, 0), (0, 0xFFFFFFFF), (4, 1)):
        wrong = coded[:place] + value.to_bytes(4, "little") + coded[place + 4 :]
        refused(wrong, coding, tmp_path, "has a table of frames that ends at byte")
    first, second = np.frombuffer(coded[:8], "<u4").tolist()
    moved = np.array([first + 1, second - 1], "<u4").tobytes() + coded[8:]
    refused(moved, coding, tmp_path, "cannot be decoded|has a frame")
    refused(coded[:10], coding, tmp_path, "too few for the table")
    refused(coded[:-1], coding, tmp_path, "has a table of frames that ends at byte")
    refused(coded + b"x", coding, tmp_path, "has a table of frames that ends at byte")


def test_frames_that_hold_something_else_are_refused(good, tmp_path):
    _, coded, coding = good
    frames = frames_of(coded, coding)
    symbols = zstandard.ZstdDecompressor().decompress(frames[0])

    def of(data: bytes, **options) -> bytes:
        return zstandard.ZstdCompressor(write_checksum=options.pop("checksum", True), **options).compress(data)

    for frame, match in (
        (of(symbols[:-1]), "has a frame of 4095 symbols"),
        (of(symbols + b"\0"), "has a frame of 4097 symbols"),
        (of(symbols, checksum=False), "checksum: False"),
        (of(symbols, write_content_size=False), "has a frame of"),
        (of(symbols) + b"more", "cannot be decoded"),
        (of(symbols) + of(b"x"), "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", "has a frame of|cannot be decoded"),  # a frame to be skipped
        (of(b"\xff" * len(symbols)), "symbols of more than 6 bits"),
    ):
        refused(*with_frames([frame, *frames[1:]], coding), tmp_path, match)


def test_a_small_file_that_claims_much_is_refused_before_memory_is_taken(good, tmp_path, monkeypatch):
    _, coded, coding = good
    taken: list[int] = []
    monkeypatch.setattr(entropy, "allocate_bytes", lambda path, count: taken.append(count))
    huge = Coding("I32", (1 << 20, 1 << 20), 1, 8, 0)
    refused(coded, huge, tmp_path, "too few for the table")
    bomb = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(1 << 26))
    taken_before = len(taken)
    monkeypatch.undo()
    monkeypatch.setattr(symbols, "CHUNK", 4096)
    frames = frames_of(coded, coding)
    refused(*with_frames([bomb, *frames[1:]], coding), tmp_path, f"has a frame of {1 << 26} symbols")
    assert taken_before == 0


def test_a_coding_that_makes_nothing_smaller_is_refused(good, tmp_path):
    _, coded, _ = good
    refused(coded, Coding("U8", (len(coded),), 1, 8, 0), tmp_path, "makes no smaller is not coded")


@pytest.mark.parametrize("kind", ["codes", "numbers"])
def test_random_damage_is_refused_or_without_effect(kind, tmp_path):
    """Bytes changed, removed, repeated, moved: never another tensor, never another error."""
    tensor = (
        codes(3) if kind == "codes" else torch.randn(60, 200, generator=torch.Generator().manual_seed(4)).bfloat16()
    )
    found = encode(tensor, 3)
    coded, coding = octets(found[0]), found[1]
    generator, refusals = random.Random(5), 0
    for _ in range(400):
        damaged = bytearray(coded)
        for _ in range(generator.choice((1, 1, 2, 5))):
            place, length = generator.randrange(len(damaged)), generator.randrange(1, 40)
            match generator.randrange(4):
                case 0:
                    damaged[place] ^= 1 << generator.randrange(8)
                case 1:
                    damaged[place : place + length] = generator.randbytes(min(length, len(damaged) - place))
                case 2:
                    piece = damaged[place : place + length]
                    del damaged[place : place + length]
                    where = generator.randrange(len(damaged) + 1)
                    damaged[where:where] = piece
                case 3:
                    del damaged[place : place + length]
        try:
            assert octets(read(bytes(damaged), coding, tmp_path)) == octets(tensor)
        except BadFileError as error:
            assert NAME in str(error)
            refusals += 1
    assert refusals > 380


def test_a_source_wants_the_tensors_that_are_described(tiny_model):
    source = open_checkpoint(tiny_model).source
    for name, match in (("zap", "is missing"), ("model.norm.weight", "is stored as BF16")):
        with pytest.raises(BadFileError, match=match):
            CodedSource(source, {name: parse_coding(GOOD)})
