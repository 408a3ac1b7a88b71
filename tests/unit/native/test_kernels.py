"""Every kind of matrix on every instruction set against plain numpy, bit for bit."""

import os
import subprocess
import sys

import numpy as np
import packed_matrices
import pytest
from packed_matrices import Maker, Packed

native = pytest.importorskip("quern._native", reason="the native part is not built")

ISAS = native.isas()
FEW, MANY = (1, 2, 3, 4, 5, 6, 7, 8), (9, 17, 40)


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def matrix(packed: Packed):
    def octets(array):
        return array.reshape(-1).view(np.int8 if array is packed.arrays.get("table") else np.uint8)

    arrays = {name: octets(np.ascontiguousarray(array)) for name, array in packed.arrays.items() if name != "table"}
    if "table" in packed.arrays:
        arrays["table"] = packed.arrays["table"].reshape(-1)
    return native.Matrix(**packed.keywords(), **arrays)


def inputs(tokens: int, columns: int, seed: int = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, columns)).astype(np.float32)
    x[:, random.integers(0, columns, 2)] *= 20  # outliers
    return x


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found, expected)


def check(packed: Packed, tokens=(*FEW, *MANY), threads=1) -> None:
    weight = matrix(packed)
    x = inputs(max(tokens), packed.columns)
    expected = packed.product(x)
    for count in tokens:
        same(native.multiply(weight, x[:count].copy(), threads), expected[:count])


SHAPES = [(1, 1), (1, 130), (3, 15), (15, 16), (16, 17), (17, 31), (5, 200), (33, 257), (40, 1029)]
GROUPED = [(9, 64, 32), (17, 1000, 128), (4, 2048, 128), (7, 2176, 64), (20, 550, 32), (3, 700, 96), (6, 800, 256)]
GROUPED += [(5, 300, 16), (9, 1290, 16), (10, 1160, 64)]
ODD_GROUPS = [(3, 50, 7), (5, 66, 33), (2, 100, 6), (3, 300, 20), (1, 9, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_integer4_rows(isa, shape, zeros):
    check(Maker(2).integer4(*shape, zeros=zeros), tokens=(*FEW, *MANY, 70))


@pytest.mark.parametrize("shape", GROUPED + ODD_GROUPS)
@pytest.mark.parametrize("zeros", [False, True])
def test_integer4_groups(isa, shape, zeros):
    check(Maker(3).integer4(*shape, zeros=zeros), tokens=(*FEW, *MANY, 70))


@pytest.mark.parametrize("kind", ["integer4", "integer8", "codebook4", "trellis"])
@pytest.mark.parametrize("scale_type", packed_matrices.SCALE_TYPES)
def test_scale_types(isa, kind, scale_type):
    group = {} if kind == "trellis" else {"group": 64}
    check(getattr(Maker(4), kind)(19, 260, scale_type=scale_type, **group), tokens=(1, 3, 9))


@pytest.mark.parametrize("zeros", [False, True])
def test_one_scale_for_all_rows(isa, zeros):
    check(Maker(5).integer4(21, 200, zeros=zeros, one_scale=True), tokens=(1, 2, 9))
    check(Maker(5).integer8(21, 200, one_scale=True), tokens=(1, 2, 9))


@pytest.mark.parametrize("shape", SHAPES + GROUPED + ODD_GROUPS)
def test_integer8(isa, shape):
    check(Maker(6).integer8(*shape))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES + GROUPED + ODD_GROUPS)
def test_codebooks(isa, bits, shape):
    check(Maker(7).codebook(bits, *shape))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shared", ["row", "group"])
def test_codebooks_of_rows_and_groups(isa, bits, shared):
    for shape in ((9, 200), (33, 1290, 16), (5, 1200, 32), (3, 2176, 64), (6, 1800, 128), (3, 800, 256), (2, 50, 7),
                  (5, 66, 33), (3, 300, 20), (3, 1000, 192)):  # fmt: skip
        check(Maker(70).codebook(bits, *shape, shared=shared), tokens=(1, 2, 7, 9))


@pytest.mark.parametrize("factor", [0.5, 3e-3])
def test_scales_have_a_factor(isa, factor):
    for scale_type, group in (("float8_e8m0fnu", 32), ("float8_e4m3fn", 16), ("float16", 64)):
        check(Maker(73).codebook(4, 33, 1290, group, scale_type, factor=factor), tokens=(1, 2, 9, 17))


@pytest.mark.parametrize("factor", [1.0, 1.5e36])
@pytest.mark.parametrize(
    ("scale_type", "group", "none"),
    [("float8_e8m0fnu", 32, 0xFF), ("float8_e4m3fn", 16, 0x7F), ("float8_e4m3fn", 16, 0xFF)],
)
def test_scales_of_a_byte_may_be_any(isa, scale_type, group, none, factor):
    """Rows have scales close to each other, all of them every one; what is none spoils its row alone."""
    rows, columns = 40, 1280
    packed = Maker(76).codebook(4, rows, columns, group, scale_type, factor=factor)
    near = np.random.default_rng(77).integers(0, 8, (rows, columns // group)) + np.arange(rows)[:, None] * 7
    scale = np.minimum(near, 0xFE).astype(np.uint8)
    scale[scale & 0x7F == 0x7F] -= scale_type == "float8_e4m3fn"
    scale[21, 18] = none
    packed.arrays["scale"] = scale
    weight, x = matrix(packed), inputs(3, columns)
    found = native.multiply(weight, x, 1)
    native.use_isa("scalar")
    np.testing.assert_array_equal(found, native.multiply(weight, x, 1))
    assert np.isnan(found[:, 21]).all()
    assert np.isfinite(found[:, : 20 if factor == 1.0 else 1]).all()


@pytest.mark.parametrize("kind", packed_matrices.SUPERBLOCKS)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (16, 768), (17, 1280), (33, 256), (40, 2304), (270, 512)])
def test_superblocks(isa, kind, shape):
    check(Maker(80).superblocks(kind, *shape))


@pytest.mark.parametrize("kind", packed_matrices.SUPERBLOCKS)
@pytest.mark.parametrize("sign", [1, -1])
def test_superblocks_at_their_ends(isa, kind, sign):
    packed = Maker(81, extreme=True).superblocks(kind, 20, 1024)
    x = np.full((10, 1024), sign, np.float32)
    x[1::2, ::3] *= -1
    for tokens in (1, 4, 10):
        same(native.multiply(matrix(packed), x[:tokens].copy(), 1), packed.product(x[:tokens]))


def test_superblocks_are_whole(isa):
    packed = Maker(82).superblocks("q4_k", 4, 512)
    for change in ({"columns": 500}, {"group": 64}, {"group": None}):
        with pytest.raises(ValueError, match="a matrix of q4_k has whole blocks of 256 columns in groups of 32"):
            native.Matrix(**{**packed.keywords(), **change}, codes=packed.arrays["codes"].reshape(-1))


@pytest.mark.parametrize("variant", ["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", SHAPES + GROUPED + ODD_GROUPS)
def test_float8(isa, variant, shape):
    check(Maker(74).float8(variant, *shape), tokens=(1, 2, 5, 8, 9))


@pytest.mark.parametrize("variant", ["e4m3", "e5m2"])
def test_float8_codes_that_are_no_number_show(isa, variant):
    packed = Maker(75).float8(variant, 6, 100, 32)
    packed.arrays["codes"][3, 41] = 0x7F
    found = native.multiply(matrix(packed), inputs(2, 100), 1)
    assert np.isnan(found[:, 3]).all()
    assert np.isfinite(np.delete(found, 3, axis=1)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_plain(isa, kind, shape):
    check(Maker(8).plain(kind, *shape))


VARIANTS = [(bits, window, 1, 0) for bits in (1, 2, 3, 4) for window in (6, 7)] + [
    (bits, window, 2, lag) for bits in (2, 3, 4) for window in (6, 7) for lag in (1, 2, 3, 4, 5)
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_trellis_variants(isa, variant):
    check(Maker(9).trellis(256 + 128, 69, *variant), tokens=(1, 2, 9))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40, 128, 255, 256, 257, 300, 512])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_trellis_heights(isa, rows, bits):
    check(Maker(10).trellis(rows, 21, bits, 7), tokens=(1, 3, 17))
    check(Maker(11).trellis(rows, 6, bits, 6, 2, 1), tokens=(1, 3, 17))


@pytest.mark.parametrize("tokens", [*FEW, *MANY])
def test_trellis_tokens(isa, tokens):
    check(Maker(12).trellis(300, 150, 3, 7, 2, 2), tokens=(tokens,))


@pytest.mark.parametrize("lag", [1, 3])
def test_trellis_tables_whose_sums_do_not_fit_a_byte(isa, lag):
    packed = Maker(13).trellis(300, 130, 2, 6, 2, lag, fits=False)
    assert np.abs(packed.values).max() > 128
    check(packed)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_results(isa, threads):
    maker = Maker(14)
    for packed in (
        maker.trellis(600, 1500, 2, 7),
        maker.trellis(200, 4100, 3, 6, 2, 2, fits=False),
        maker.integer4(200, 1500, 128, zeros=True),
        maker.integer8(200, 1500),
        maker.plain("bfloat16", 90, 500),
        maker.superblocks("q4_k", 300, 1536),
        maker.superblocks("q6_k", 300, 2560),
    ):
        check(packed, tokens=(1, 5, 70), threads=threads)


@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_overflow(isa, sign):
    """All codes at their ends and all inputs at +-127: sums in 16 bits, and unsigned times signed, are at their worst."""
    maker = Maker(15, extreme=True)
    columns = 4096 + 36
    for packed in (
        maker.integer4(33, columns),
        maker.integer4(33, columns, 128, zeros=True),
        maker.codebook4(33, columns, 64),
        maker.integer8(33, columns),
        maker.trellis(33, columns, 2, 7),
        maker.trellis(33, columns, 2, 6, 2, 2),
        maker.trellis(33, columns, 2, 6, 2, 2, fits=False),
    ):
        weight = matrix(packed)
        x = np.full((10, columns), sign, np.float32)
        x[1::2, ::3] *= -1
        for tokens in (1, 4, 10):
            same(native.multiply(weight, x[:tokens].copy(), 1), packed.product(x[:tokens]))
    least = Maker(16).integer8(33, columns)
    least.arrays["codes"][:] = -128
    least.values[:] = -128
    same(native.multiply(matrix(least), x, 1), least.product(x))


@pytest.mark.parametrize("sign", [1, -1])
def test_inputs_that_are_large_together(isa, sign):
    """Neighbours of one sign, near their ends: two products with weights from 0 to 255 do not fit 16 bits."""
    maker = Maker(23)
    for packed in (
        maker.trellis(300, 196, 2, 6),
        maker.trellis(300, 197, 3, 7),
        maker.trellis(300, 196, 4, 7, 2, 1, fits=False),
        maker.integer8(40, 700),
    ):
        x = sign * np.random.default_rng(24).uniform(0.4, 1, (17, packed.columns)).astype(np.float32)
        for tokens in (1, 4, 6, 17):
            same(native.multiply(matrix(packed), x[:tokens].copy(), 1), packed.product(x[:tokens]))


def test_result_of_a_token_does_not_depend_on_the_others(isa):
    maker = Maker(17)
    for packed in (
        maker.integer4(300, 900, 128, zeros=True),
        maker.integer4(40, 2100, 64),
        maker.trellis(300, 900, 3, 7),
        maker.trellis(300, 900, 4, 7, 2, 1),
    ):
        x = inputs(50, packed.columns)
        together = native.multiply(matrix(packed), x, 2)
        for first, tokens in ((0, 1), (13, 1), (49, 1), (3, 4), (20, 7), (30, 16)):
            part = slice(first, first + tokens)
            same(native.multiply(matrix(packed), x[part].copy(), 2), together[part])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_stays_so(isa, bad):
    packed = Maker(18).integer4(20, 300, 64)
    x = inputs(10, 300)
    x[3, 70] = bad
    found = native.multiply(matrix(packed), x, 1)
    assert np.isnan(found[3]).all()
    same(np.delete(found, 3, 0), np.delete(packed.product(np.nan_to_num(x, posinf=0, neginf=0)), 3, 0))


def test_zero_and_tiny_inputs(isa):
    packed = Maker(19).integer8(20, 300)
    x = np.zeros((9, 300), np.float32)
    x[1] = np.float32(1e-40)
    x[2] = np.float32(1e-20)
    x[3] = np.float32(1e30)
    same(native.multiply(matrix(packed), x, 1), packed.product(x))


@pytest.mark.parametrize(("columns", "group"), [(1, 1), (15, 15), (100, 32), (1000, 128), (257, 257), (300, 7)])
def test_quantize(isa, columns, group):
    x = inputs(11, columns)
    x[5] = 0
    x[6, : columns // 2] = np.arange(columns // 2) + 0.5  # halves: ties, where the scale is a power of two
    x[6, 0] = 127
    values, scale, sums = native.quantize(x, group, 2)
    expected, expected_scale = packed_matrices.quantize(x, group)
    np.testing.assert_array_equal(values, expected)
    same(scale, expected_scale)
    np.testing.assert_array_equal(sums, np.add.reduceat(expected, np.arange(0, columns, group), axis=1))


@pytest.mark.parametrize(("columns", "group"), [(1, 1), (15, 15), (100, 32), (1000, 128), (300, 7)])
@pytest.mark.parametrize("given", [0.03125, 1e-3, 1e30])
def test_quantize_by_a_given_scale(isa, columns, group, given):
    """Values beyond the range end at its ends, however far; ties go to even; a group with no number says so."""
    x = inputs(9, columns)
    x[1] = 0
    x[2] = np.float32(given) * (np.arange(columns) - columns // 2 + np.float32(0.5))
    x[3, 0], x[4, 0] = np.float32(3e38), np.float32(-3e38)
    values, scale, sums = native.quantize(x, group, 2, given)
    expected = packed_matrices.quantize_by(x, np.float32(given))
    np.testing.assert_array_equal(values, expected)
    assert np.abs(values.astype(int)).max() <= 127
    assert (scale == np.float32(given)).all()
    np.testing.assert_array_equal(sums, np.add.reduceat(expected, np.arange(0, columns, group), axis=1))
    for bad in (np.nan, np.inf, -np.inf):
        x[5, 0] = bad
        values, scale, sums = native.quantize(x, group, 1, given)
        assert np.isnan(scale[5, 0])
        assert not values[5, :group].any()
        assert sums[5, 0] == 0


@pytest.mark.parametrize(("columns", "group"), [(15, 15), (100, 32), (1000, 128), (300, 7)])
def test_quantize_by_one_scale_a_token(isa, columns, group):
    x = inputs(11, columns)
    x[5] = 0
    values, scale, sums = native.quantize(x, group, 2, 0.0, True)
    expected, whole = packed_matrices.quantize(x, columns)
    np.testing.assert_array_equal(values, expected)
    same(scale, np.repeat(whole, -(-columns // group), axis=1))
    np.testing.assert_array_equal(sums, np.add.reduceat(expected, np.arange(0, columns, group), axis=1))


def test_a_given_scale_is_a_number_above_zero():
    for bad in (-1.0, float("nan"), float("inf"), 1e-42):
        with pytest.raises(ValueError, match="a normal number above zero"):
            native.quantize(inputs(2, 8), 8, 1, bad)


@pytest.mark.parametrize("columns", [1, 2, 6, 16, 24, 48, 64, 256, 384, 512, 1024, 2048, 896, 8192, 29568])
def test_rotate(isa, columns):
    random = np.random.default_rng(20)
    x = random.standard_normal((3, columns)).astype(np.float32)
    signs = random.integers(0, 256, -(-columns // 8), dtype=np.uint8)
    flip = np.where(np.unpackbits(signs, bitorder="little")[:columns], np.float32(-1), np.float32(1))
    block = columns & -columns
    expected = (x * flip).reshape(3, -1, block)
    half = 1
    while half < block:  # the additions in the documented order
        pairs = expected.reshape(3, -1, block // (2 * half), 2, half)
        a, b = pairs[:, :, :, 0], pairs[:, :, :, 1]
        expected = np.stack([a + b, a - b], axis=3).reshape(3, -1, block)
        half *= 2
    expected = expected * (np.float32(1) / np.sqrt(np.float32(block)))
    same(native.rotate(x, signs, 2), expected.reshape(3, columns))


def test_rotating_keeps_lengths():
    x = inputs(4, 896)
    turned = native.rotate(x, np.full(112, 0b10110001, np.uint8), 1)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=896 * 2.0**-24)


def test_isas_are_listed_best_first_and_chosen_by_name():
    assert ISAS[-1] == "scalar"
    assert native.isa() in ISAS
    with pytest.raises(ValueError, match="'mmx' is unknown or not available on this machine; it has: .*scalar"):
        native.use_isa("mmx")


@pytest.mark.parametrize(
    ("name", "code", "text"), [("scalar", 0, "scalar"), ("bogus", 1, "QUERN_ISA: instruction set 'bogus'")]
)
def test_environment_forces_an_isa(name, code, text):
    program = "from quern import _native; print(_native.isa())"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "QUERN_ISA": name}, capture_output=True, text=True
    )
    assert done.returncode == code
    assert text in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["probe"], ["probe", "--json"]])
def test_a_wrong_isa_in_the_environment_is_a_users_error(arguments):
    done = subprocess.run(
        [sys.executable, "-c", "from quern.cli.main import run; run()", *arguments],
        env={**os.environ, "QUERN_ISA": "bogus"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: QUERN_ISA: instruction set 'bogus' is unknown or not available")
    assert done.stdout == ""


def test_subnormal_numbers_survive_the_import():
    """A library linked with -ffast-math would flush them to zero for the whole process."""
    assert np.float32(1e-40) * np.float32(1) != 0
    assert 5e-324 * 1.0 != 0


def test_a_matrix_refuses_other_inputs():
    weight = matrix(Maker(21).integer8(4, 10))
    with pytest.raises(ValueError, match="the matrix has 10 columns, the inputs have 11"):
        native.multiply(weight, np.zeros((1, 11), np.float32), 1)
    with pytest.raises(TypeError):
        native.multiply(weight, np.zeros((1, 10), np.float64), 1)
    with pytest.raises(TypeError):
        native.multiply(weight, np.zeros((10, 2), np.float32).T, 1)
    with pytest.raises(ValueError, match="threads must be"):
        native.multiply(weight, np.zeros((1, 10), np.float32), -1)


def test_no_tokens_give_no_outputs():
    weight = matrix(Maker(22).integer8(4, 10))
    assert native.multiply(weight, np.zeros((0, 10), np.float32), 1).shape == (0, 4)
