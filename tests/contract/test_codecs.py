"""What every codec promises for every scheme that it can store: exact shapes, exact decoding, no surprises at the edges."""

import math

import numpy as np
import pytest
import torch
from schemes import ALL, EVERY, gaussian, make_codec, promised, round_by_column, scheme_id

from quern.codecs.base import CODECS, decode
from quern.core.errors import UserError
from quern.core.packed import QuantizedWeight

ROWS, COLUMNS = (1, 15, 16, 17, 33), (1, 31, 32, 33, 100)
SCALE_DTYPES = ("float16", "bfloat16", "float32")
OBSERVERS = ("min_max", "percentile", "mean_squared_error")
every_scheme = pytest.mark.parametrize("scheme", ALL, ids=scheme_id)


def shapes_of(scheme):
    """Every number of rows with one number of columns, another one for each scheme in turn."""
    turn = ALL.index(scheme)
    return [(rows, COLUMNS[(position + turn) % 5]) for position, rows in enumerate(ROWS)]


def assert_announced(codec, shape, parts):
    announced = codec.part_shapes(shape)
    assert set(parts) == set(announced)
    for name, (size, dtype) in announced.items():
        assert (tuple(parts[name].shape), parts[name].dtype) == (size, dtype), name


@pytest.mark.parametrize("name", CODECS.names())
def test_every_codec_stores_something_and_what_is_promised(name):
    """The other tests run over what a codec stores; one that refuses all of it must not pass for that."""
    own = [scheme for scheme in EVERY if scheme["codec"] == name]
    stored = [scheme for scheme in ALL if scheme["codec"] == name]
    assert stored
    if promised(own[0]) is not None:
        assert stored == [scheme for scheme in own if promised(scheme)]


@every_scheme
def test_decoding_gives_what_rounding_returned(scheme):
    for position, shape in enumerate(shapes_of(scheme)):
        codec = make_codec(scheme, observer="min_max", scale_dtype=SCALE_DTYPES[position % 3])
        weight = gaussian(*shape)
        before = weight.clone()
        at_once, by_column, refitted = (codec.encoder(weight, weight, refit=refit) for refit in (False, False, True))
        whole = at_once.round_all(weight)
        for encoder, rounded in ((at_once, whole), (by_column, round_by_column(by_column, weight)),
                                 (refitted, round_by_column(refitted, weight))):  # fmt: skip
            parts = codec.join([encoder.parts()])
            assert all(part.is_contiguous() for part in parts.values())
            assert_announced(codec, shape, parts)
            assert torch.equal(codec.decode(shape, parts), rounded), shape
            assert torch.equal(decode(QuantizedWeight(codec.scheme, shape, parts)), rounded)
        assert torch.equal(whole, round_by_column(codec.encoder(weight, weight, refit=False), weight))
        assert torch.equal(weight, before), "the input is not to be touched"


@every_scheme
def test_columns_may_come_in_any_order(scheme):
    codec = make_codec(scheme)
    weight = gaussian(17, 100)
    encoder = codec.encoder(weight, weight, refit=False)
    tuples = -(-100 // encoder.width)
    for place in torch.randperm(tuples, generator=torch.Generator().manual_seed(5)).tolist():
        column = place * encoder.width
        encoder.round(column, weight[:, column : column + encoder.width].T.clone())
    straight = codec.encoder(weight, weight, refit=False)
    straight.round_all(weight)
    assert_same_parts(encoder.parts(), straight.parts())


@every_scheme
def test_stored_values_round_to_themselves(scheme):
    """Points on the grid cost nothing: what was decoded is rounded again by the same parameters, bit for bit."""
    codec = make_codec(scheme)
    weight = gaussian(16, 100)
    encoder = codec.encoder(weight, weight, refit=False)
    once = encoder.round_all(weight)
    codes = encoder.parts()
    assert torch.equal(encoder.round_all(once), once)
    assert_same_parts(encoder.parts(), codes)


@every_scheme
def test_exact_parts_are_found_for_what_was_decoded_and_for_nothing_else(scheme):
    for position, shape in enumerate(shapes_of(scheme)):
        codec = make_codec(scheme, observer="min_max", scale_dtype=SCALE_DTYPES[position % 3])
        weight = gaussian(*shape)
        values = codec.encoder(weight, weight, refit=False).round_all(weight)
        parts = codec.exact_parts(values)
        if not codec.takes_values:
            assert parts is None
            continue
        assert parts is not None
        assert_announced(codec, shape, parts)
        assert torch.equal(codec.decode(shape, parts), values)
        zeros = codec.exact_parts(torch.zeros(shape))
        assert zeros is not None
        assert torch.equal(codec.decode(shape, zeros), torch.zeros(shape))
        if shape[1] >= 31:
            assert codec.exact_parts(weight) is None
            values[-1, :2] = torch.tensor([1, math.pi])  # neighbours, no eight bits of any step
            assert codec.exact_parts(values) is None


@every_scheme
def test_slabs_join_to_the_whole(scheme):
    codec = make_codec(scheme)
    height = codec.slab_rows
    rows = 2 * height + 6
    weight = gaussian(rows, 100)
    whole = codec.encoder(weight, weight, refit=False)
    rounded = whole.round_all(weight)
    slabs, decoded = [], []
    for start, stop in ((0, height), (height, 2 * height), (2 * height, rows)):
        encoder = codec.encoder(weight[start:stop], weight, refit=False)
        decoded.append(encoder.round_all(weight[start:stop]))
        slabs.append(encoder.parts())
    joined = codec.join(slabs)
    assert_announced(codec, (rows, 100), joined)
    assert_same_parts(joined, whole.parts())
    assert torch.equal(torch.cat(decoded), rounded)


@every_scheme
def test_rows_decode_alone(scheme):
    codec = make_codec(scheme, observer="min_max")
    for shape in ((33, 100), (1, 31)):
        weight = gaussian(*shape)
        encoder = codec.encoder(weight, weight, refit=False)
        encoder.round_all(weight)
        parts = encoder.parts()
        whole = codec.decode(shape, parts)
        for rows in ([0], [shape[0] - 1, 0, 0], list(range(shape[0])), []):
            index = torch.tensor(rows, dtype=torch.int64)
            assert torch.equal(codec.decode_rows(shape, parts, index), whole[index])


EDGES = {
    "zeros": torch.zeros(3, 20),
    "one zero row": torch.stack([torch.zeros(20), torch.ones(20), torch.linspace(-1, 1, 20)]),
    "constant rows": torch.tensor([[0.5], [-0.5], [1e-3]]).expand(3, 20).contiguous(),
    "only positive": torch.linspace(0.5, 1.5, 60).reshape(3, 20),
    "only negative": -torch.linspace(0.5, 1.5, 60).reshape(3, 20),
    "one spike": torch.eye(3, 20) * 1e4,
    "tiny": torch.linspace(-1e-30, 1e-30, 60).reshape(3, 20),
    "subnormal": torch.linspace(-1e-40, 1e-40, 60).reshape(3, 20),
    "huge": torch.linspace(-1e30, 1e30, 60).reshape(3, 20),
    "largest": torch.linspace(-1, 1, 60).reshape(3, 20) * torch.finfo(torch.float32).max,
}


@every_scheme
def test_extreme_values_stay_finite_or_are_refused(scheme):
    for position, (name, weight) in enumerate(EDGES.items()):
        turn = position + ALL.index(scheme)
        codec = make_codec(scheme, observer=OBSERVERS[turn % 3], scale_dtype=SCALE_DTYPES[turn // 3 % 3])
        refused = 0
        for refit in (False, True):
            try:
                encoder = codec.encoder(weight, weight, refit)
                rounded = round_by_column(encoder, weight)
            except UserError as error:
                refused += 1
                assert "scale_dtype" in str(error)
                continue
            assert bool(rounded.isfinite().all()), (name, codec.scheme)
            assert torch.equal(codec.decode((3, 20), encoder.parts()), rounded)
            # At one and two bits the least code lies well below the least value.
            assert bool((rounded.abs() <= 2.01 * weight.abs().max() + 2.0**-16).all()), (name, codec.scheme)
        assert refused in ((0, 2) if name in ("huge", "largest") else (0,)), f"{name} is ordinary"


@every_scheme
def test_size_is_what_the_bits_say(scheme):
    """Codes of a row take bits x columns, rounded up to whole words, twice where they lie in two planes; scales, zero points
    and tables come on top: with k-means one for each scale. Codes of several columns at once are stored as a whole.

    A trellis is stored by tiles: a multiple of 128 rows and 4 columns takes not a bit more, and other matrices take what the
    next multiples of 64 rows at 2 or 4 bits, or of 128 at 3, and of 4 columns would.
    """
    codec = make_codec(scheme)
    rows, columns = (384, 100) if scheme["codec"] == "trellis" else (33, 100)
    parts = codec.part_shapes((rows, columns))
    stored = {name: math.prod(size) * dtype.itemsize for name, (size, dtype) in parts.items()}
    bits = codec.describe().bits
    if "type" in scheme:
        columns += -columns % codec.encoder(gaussian(2, 64), gaussian(2, 64), refit=False).width
    spare = 0 if scheme["codec"] == "trellis" else 8 if scheme["codec"] not in ("integer", "ggml") and bits == 3 else 4
    assert rows * columns * bits / 8 <= stored["codes"] <= rows * (columns * bits / 8 + spare)
    table = stored.pop("table", 0)
    scales = math.prod(parts["scale"][0])
    assert table <= (scales << scheme["bits"] if scheme["codec"] == "kmeans" else 256)
    assert sum(stored.values()) - stored["codes"] <= rows * 4 * 8 + stored.pop("tensor_scale", 0)
    if scheme["codec"] == "trellis":
        step = 128 if scheme["bits"] == 3 else 64
        for ragged in ((1, 1), (65, 3), (200, 97), (300, 5)):
            filled = tuple(-(-size // whole) * whole for size, whole in zip(ragged, (step, 4), strict=True))
            assert codec.part_shapes(ragged)["codes"][0][0] <= filled[0] * filled[1] * scheme["bits"] / 8


def assert_same_parts(first, second):
    assert set(first) == set(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# What the integer codec stores, and how much it loses.


INTEGER = [scheme for scheme in ALL if scheme["codec"] == "integer"]


@pytest.mark.parametrize("scheme", INTEGER, ids=scheme_id)
def test_every_integer_of_the_grid_is_kept(scheme):
    """Each code times a scale that is a power of two: the whole grid occurs, none of it is moved."""
    codec = make_codec(scheme, observer="min_max")
    levels, middle, step = codec.grid.levels, codec.grid.middle, 2.0**-5
    zero = middle if scheme["symmetric"] else levels // 3
    codes = torch.arange(64).remainder(levels + 1).roll(3).expand(4, 64)
    encoder = codec.encoder(torch.ones(4, 64), torch.ones(4, 64), refit=False)
    encoder.scale[:], encoder.zero[:] = step, zero
    values = (codes - zero) * step
    assert torch.equal(encoder.round_all(values.clone()), values)
    assert torch.equal(codec.decode((4, 64), encoder.parts()), values)


def best_loss(bits: int) -> float:
    """Mean squared error on a unit Gaussian of the integers -2^(b-1) ... 2^(b-1) - 1 times the best scale."""
    x = np.linspace(-6, 6, 4001)
    density = np.exp(-x * x / 2) / np.exp(-x * x / 2).sum()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = np.linspace(0.2, 1.4, 300)
    return min(float(density @ (x - s * np.clip(np.round(x / s), low, high)) ** 2) for s in scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_loss_on_a_gaussian_lies_in_a_band(bits):
    """Not better than the best scale for the distribution could be, and near it.

    2 % below: the scale is fitted to the 4096 values of each row, whose own best loss varies. 10 % above: the range is searched in
    steps of 5 % of the greatest value, so the scale may be off by 2.5 % of that, about 5 % of itself.
    """
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(bits))
    codec = make_codec({"codec": "integer", "bits": bits, "symmetric": True, "granularity": "channel"})
    loss = float((codec.encoder(weight, weight, refit=False).round_all(weight) - weight).square().mean())
    assert 0.98 * best_loss(bits) <= loss <= 1.10 * best_loss(bits)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_fine_grids_lose_a_twelfth_of_the_step_squared(bits):
    """Uniform noise: without clipping the error of a fine grid is scale^2 / 12 (Bennett 1948), here within 5 %."""
    weight = torch.rand(16, 4096, generator=torch.Generator().manual_seed(bits)) - 0.5
    for symmetric in (True, False):
        codec = make_codec({"codec": "integer", "bits": bits, "symmetric": symmetric, "granularity": "channel"},
                           observer="min_max")  # fmt: skip
        encoder = codec.encoder(weight, weight, refit=False)
        loss = float((encoder.round_all(weight) - weight).square().mean())
        expected = float(encoder.scale.square().mean()) / 12
        assert 0.95 * expected <= loss <= 1.05 * expected


def test_values_half_way_go_to_the_even_code():
    codec = make_codec({"codec": "integer", "bits": 4, "symmetric": True, "granularity": "channel"}, observer="min_max")
    weight = torch.tensor([[-8.0, -7.5, -6.5, -1.5, -0.5, 0.5, 1.5, 6.5, 7.5]])
    encoder = codec.encoder(weight, weight, refit=False)
    encoder.scale[:] = 1.0
    assert encoder.round_all(weight).tolist() == [
        [-8, -8, -6, -2, 0, 0, 2, 6, 7]
    ]  # 7.5 would be 8, which is off the grid


def test_scales_that_overflow_are_refused_with_the_way_out():
    codec = make_codec({"codec": "integer", "bits": 4, "symmetric": True, "granularity": "channel"})
    with pytest.raises(
        UserError, match=r"1e\+30 are too large for scales in scale_dtype float16. .* bfloat16 and float32"
    ):
        codec.encoder(torch.full((1, 4), 1e30), torch.full((1, 4), 1e30), refit=False)


@pytest.mark.parametrize("codec", ["integer", "log"])
def test_no_larger_scales_are_offered_where_there_are_none(codec):
    weight = torch.full((1, 32), 3.4e38)
    with pytest.raises(UserError) as raised:
        make_codec({"codec": codec, "scale_dtype": "bfloat16"}).encoder(weight, weight, refit=False)
    assert str(raised.value).endswith("are too large for scales in scale_dtype bfloat16. Check the checkpoint")


def test_unknown_codec_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown codec 'zap'; known: .*integer"):
        CODECS.get("zap")
