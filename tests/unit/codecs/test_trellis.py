"""The trellis codec: the layout by hand, the encoder against a plain search, what the tables lose, and malformed input."""

import itertools

import numpy as np
import pytest
import torch
from packed_matrices import decode_trellis

from quern import _native
from quern.codecs.base import CODECS
from quern.codecs.trellis import stream_bytes, trained_tables, windows
from quern.core.errors import UserError
from quern.core.recipe import parse_recipe
from quern.core.scheme import parse_scheme

VARIANTS = sorted(trained_tables())
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "/".join(map(str, v)))
ISAS = ("scalar", *(name for name in ("avx2", "avx512") if name in _native.isas()))


def codec_of(variant, **changes):
    bits, window, tables = variant
    scheme = {"codec": "trellis", "bits": bits, "window": window, "tables": tables, **changes}
    return CODECS.get("trellis")(parse_scheme(scheme))


def encoder_of(codec, rows: int, columns: int, scale: float = 1.0, isa: str = "") -> _native.TrellisEncoder:
    scales = np.full(rows, scale, np.float32)
    return _native.TrellisEncoder(codec.params.bits, codec.lag, codec.table.entries.numpy(), scales, columns, isa)


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def rounded(codec, weight: np.ndarray, scale: float = 1.0, isa: str = "") -> tuple[np.ndarray, np.ndarray]:
    encoder, decoded = encoder_of(codec, *weight.shape, scale, isa), np.empty_like(weight)
    encoder.round_all(weight, decoded)
    return decoded, encoder.codes()


# The layout


@every_variant
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (64, 4), (256, 3), (300, 9), (560, 6)])
def test_decoding_follows_the_description_of_the_layout(variant, shape):
    """Random bytes, against the decoder that the kernels' tests have of csrc/kernels/weight.h."""
    codec, (rows, columns) = codec_of(variant), shape
    size = codec.part_shapes(shape)["codes"][0]
    rng = np.random.default_rng(sum(shape))
    parts = {
        "codes": torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)),
        "scale": torch.from_numpy(rng.uniform(0.5, 2, (rows, 1)).astype(np.float16)),
        "table": torch.from_numpy(rng.integers(-127, 128, tuple(codec.table.entries.shape)).astype(np.int8)),
    }
    heights = [min(256, rows - first) for first in range(0, rows, 256)]
    expected = decode_trellis(
        parts["codes"].numpy(), heights, columns, codec.params.bits, codec.window, parts["table"].numpy(), codec.lag
    )
    assert np.array_equal(codec.integers(shape, parts).numpy(), expected)
    assert torch.equal(codec.decode(shape, parts), torch.from_numpy(expected).float() * parts["scale"].float())


def test_windows_by_hand():
    """Three steps of 3 bits take 9 of 16 bits. Stream 0b1000001_101_011_110 (newest bits highest, seven spare)."""
    stream = torch.tensor([0b01011110, 0b10000011], dtype=torch.uint8)[:, None]
    found = windows(stream, 3, 3, 6).flatten().tolist()
    # Step 0 ends with bits 0-2; before them lie the spare bits 13-15 (100). Step 1: bits 0-5. Step 2: bits 3-8.
    assert found == [0b110_100, 0b011_110, 0b101_011]
    assert windows(stream, 3, 3, 6, 1).flatten().tolist()[1:] == found[:2]
    # One step before the first ends with the spare bit 15.
    assert windows(stream, 3, 3, 6, 1).flatten().tolist()[0] == 0b100_000


# The encoder


def plain_search(codec, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """All streams of a short tile: their values ``(streams, steps)`` and their numbers."""
    count = stream_bytes(16 * steps, codec.params.bits)
    streams = torch.tensor(list(itertools.product(range(256), repeat=count)), dtype=torch.uint8).flip(1)[..., None]
    values = 0
    for table, older in zip(codec.table.entries.int(), (0, codec.lag), strict=False):
        values = values + table[windows(streams, steps, codec.params.bits, codec.window, older)[..., 0].int()]
    return values.numpy(), np.arange(len(streams))


@every_variant
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_short_tiles_get_the_best_of_all_streams(variant, steps):
    codec = codec_of(variant)
    values, numbers = plain_search(codec, steps)
    weight = np.rint(gaussian(16 * steps, 2, steps) * 160) / 4  # quarters, which the encoder's fixed point holds
    decoded, codes = rounded(codec, weight.astype(np.float32))
    streams = codes.reshape(-1, 64).astype(np.int64)
    for column in range(2):
        for row in range(16):
            errors = np.square(values - weight[row::16, column]).sum(1)
            assert errors.min() == np.square(decoded[row::16, column] - weight[row::16, column]).sum()
            number = sum(int(byte) << (8 * i) for i, byte in enumerate(streams[:, row * 4 + column]))
            assert number == numbers[errors.argmin()], "the least stream of equals"


def plain_path(codec, x: np.ndarray) -> float:
    """Least squared error of a tail-biting path by plain dynamic programming, from every state around to itself."""
    bits, table = codec.params.bits, codec.table.entries.numpy().astype(np.int64)
    span = codec.window + bits * codec.lag
    branches = np.arange(1 << span)
    value = table[0][branches >> (span - codec.window)]
    if codec.tables == 2:
        value = value + table[1][branches & ((1 << codec.window) - 1)]
    state_bits, spare = span - bits, 8 * stream_bytes(16 * len(x), bits) - bits * len(x)
    states = 1 << state_bits
    best = np.inf
    tied = max(0, state_bits - spare)
    for seam in range(1 << tied):
        cost = np.where(np.arange(states) & ((1 << tied) - 1) == seam, 0.0, np.inf)
        for target in x:
            onward = cost[branches & (states - 1)] + np.square(value - target)
            cost = onward.reshape(states, 1 << bits).min(1)  # a branch leads to the state branch >> bits
        best = min(best, cost[np.arange(states) >> (state_bits - tied) == seam].min())
    return float(best)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[2] == 1], ids=str)
@pytest.mark.parametrize("steps", [9, 11, 16])
def test_long_tiles_come_near_the_best_path(variant, steps):
    """Of the states in which a path may cross the seam only the likeliest are tried: none is better than the best, most
    are as good, and all together lose less than one percent."""
    codec = codec_of(variant)
    weight = (np.rint(gaussian(16 * steps, 1, steps) * 160) / 4).astype(np.float32)
    decoded, _ = rounded(codec, weight)
    found = np.array([np.square(decoded[row::16] - weight[row::16]).sum() for row in range(16)])
    best = np.array([plain_path(codec, weight[row::16, 0].astype(np.float64)) for row in range(16)])
    assert bool((found >= best).all())
    assert int((found == best).sum()) >= 12
    assert found.sum() <= 1.01 * best.sum()


@every_variant
def test_all_instruction_sets_find_the_same_codes(variant):
    codec = codec_of(variant)
    weight = gaussian(256 + 176 + 3, 7) * 40
    weight[5, 3], weight[200, 2], weight[300, 1], weight[9, 0] = 1e30, -np.inf, np.nan, 700
    first, codes = rounded(codec, weight, isa="scalar")
    for isa in ISAS[1:]:
        again = rounded(codec, weight, isa=isa)
        assert np.array_equal(first, again[0])
        assert np.array_equal(codes, again[1])


@every_variant
@pytest.mark.parametrize("rows", [16, 48, 80, 144, 176, 256])
def test_points_of_the_code_are_free(variant, rows):
    """What was decoded is found again, bit for bit, whatever its scale."""
    codec = codec_of(variant)
    decoded, codes = rounded(codec, gaussian(rows, 40, rows), 0.0203)
    again, same = rounded(codec, decoded, 0.0203)
    assert np.array_equal(again, decoded)
    assert np.array_equal(same, codes)


def test_rows_below_the_matrix_cost_nothing():
    """Rows are coded as if those that fill up the last step did not exist: it is at least as good as with zeros there."""
    codec = codec_of((2, 7, 1))
    weight = gaussian(130, 64) * 40
    filled = np.zeros((144, 64), np.float32)
    filled[:130] = weight
    alone = np.square(rounded(codec, weight)[0] - weight).sum()
    with_zeros = np.square(rounded(codec, filled)[0][:130] - weight).sum()
    assert alone < with_zeros


def test_a_row_of_zeros_stays_one():
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    codec = codec_of((3, 7, 1))
    encoder = codec.encoder(weight, weight, refit=False)
    decoded = encoder.round_all(weight)
    assert torch.equal(decoded[3], torch.zeros(8))
    assert encoder.parts()["scale"][3] == 0


# What the tables lose


def lloyd_max(bits: int) -> float:
    return {2: 0.11748, 3: 0.03454, 4: 0.009497}[bits]  # Max 1960, table I


@every_variant
def test_distortion_is_what_the_data_file_says(variant):
    """On 65,536 fresh samples. The mean of n squared errors has a standard deviation below distortion x sqrt(2 / n) x 1.3
    (they are no heavier in the tail than squares of Gaussians); four of these are 3 %."""
    codec = codec_of(variant)
    weight = gaussian(256, 256, seed=sum(variant))
    decoded, _ = rounded(codec, weight, codec.table.unit)
    loss = float(np.square(weight - decoded).mean(dtype=np.float64))
    assert abs(loss / codec.table.distortion - 1) <= 0.03
    assert 4.0 ** -variant[0] < loss < lloyd_max(variant[0]), "between Shannon's bound and the best scalar quantizer"


@every_variant
def test_sums_of_entries_fit_a_byte(variant):
    """So that the kernels may add before they multiply."""
    entries = codec_of(variant).table.entries.int()
    assert int(entries.abs().amax(1).sum()) <= 127


def test_more_memory_never_loses_more():
    distortion = {key: table.distortion for key, table in trained_tables().items()}
    for bits in (2, 3, 4):
        assert distortion[bits, 6, 1] > distortion[bits, 7, 1] > distortion[bits, 7, 2]


# Requests that make no sense


@pytest.mark.parametrize(
    "changes",
    [{"bits": 1}, {"bits": 5}, {"symmetric": False}, {"granularity": "tensor"}, {"granularity": "group", "group_size": 64},
     {"window": 8}, {"tables": 3}, {"window": 6, "tables": 2}],
    ids=str,
)  # fmt: skip
def test_what_it_cannot_store_is_refused(changes):
    with pytest.raises(UserError, match="codec trellis stores 2, 3 or 4 bits, symmetric, .* Change these keys"):
        codec_of((2, 7, 1), **changes)


def test_window_and_tables_are_no_keys_of_other_codecs():
    with pytest.raises(UserError, match=r"weights\.window: unknown key; known keys here: codec, bits"):
        parse_recipe({"name": "x", "weights": {"window": 7}}, "x")
    plain = parse_scheme({"codec": "trellis", "bits": 3})
    assert (plain.params.granularity, plain.params.group_size, plain.params.window, plain.params.tables) == (
        "channel",
        None,
        7,
        2,
    )
    assert parse_scheme({"window": None}) == parse_scheme({}), "as older versions wrote it"


def test_the_encoder_checks_what_it_is_given():
    table, scales = np.zeros((1, 128), np.int8), np.ones(20, np.float32)
    made = _native.TrellisEncoder(2, 0, table, scales, 5)
    column, wide = np.zeros(20, np.float32), np.zeros((20, 5), np.float32)
    for wrong in (
        lambda: made.round(5, column, column),
        lambda: made.round(-1, column, column),
        lambda: made.round(0, column[:19].copy(), column),
        lambda: made.round(0, column, column[:19].copy()),
        lambda: made.round_all(wide[:, :4].copy(), wide),
        lambda: made.round_all(wide, wide[:19].copy()),
        lambda: _native.TrellisEncoder(1, 0, table, scales, 5),
        lambda: _native.TrellisEncoder(5, 0, table, scales, 5),
        lambda: _native.TrellisEncoder(2, 0, table[:, :100].copy(), scales, 5),
        lambda: _native.TrellisEncoder(2, 0, table[:, :32].copy(), scales, 5),
        lambda: _native.TrellisEncoder(2, 0, np.zeros((3, 128), np.int8), scales, 5),
        lambda: _native.TrellisEncoder(2, 0, np.zeros((2, 128), np.int8), scales, 5),
        lambda: _native.TrellisEncoder(2, 4, np.zeros((2, 128), np.int8), scales, 5),
        lambda: _native.TrellisEncoder(2, 0, np.full_like(table, -128), scales, 5),
        lambda: _native.TrellisEncoder(2, 0, table, scales[:0].copy(), 5),
        lambda: _native.TrellisEncoder(2, 0, table, -scales, 5),
        lambda: _native.TrellisEncoder(2, 0, table, scales * np.float32(np.nan), 5),
        lambda: _native.TrellisEncoder(2, 0, table, scales, 0),
        lambda: _native.TrellisEncoder(2, 0, table, scales, 5, "zap"),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            wrong()
    with pytest.raises(TypeError):
        made.round(0, column.astype(np.float64), column)


def test_tables_are_real_even_if_a_model_without_memory_asks_first():
    trained_tables.cache_clear()
    with torch.device("meta"):
        codec_of(VARIANTS[0])
    weight = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    assert codec_of(VARIANTS[0]).encoder(weight, weight, refit=False).round_all(weight).shape == (16, 4)
