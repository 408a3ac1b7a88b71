"""ggml's blocks of 32 with minimums and of points of a grid, hostile numbers in blocks, and panels of narrow and wide codes."""

import numpy as np
import packed_matrices
import pytest
from packed_matrices import AFFINE, POINTS, SUPERBLOCKS, Maker, Packed
from test_kernels import check, inputs, isa, matrix, native, same  # noqa: F401

HALVES_AT = {
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,),
    "q4_1": (0, 2), "q5_1": (0, 2), **dict.fromkeys(POINTS, (0,)),
}  # fmt: skip
"""Where a block's float16 numbers lie."""
BYTES = {
    "q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210, "iq4_xs": 136, "q4_1": 20, "q5_1": 24,
    "iq2_xxs": 66, "iq2_xs": 74, "iq2_s": 82, "iq3_xxs": 98, "iq3_s": 110,
}  # fmt: skip


def blocks(kind: str, rows: int, columns: int, **options) -> Packed:
    maker = Maker(83, **options)
    made = maker.affine_blocks if kind in AFFINE else maker.points if kind in POINTS else maker.superblocks
    return made(kind, rows, columns)


@pytest.mark.parametrize("kind", AFFINE)
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (17, 544), (33, 288), (270, 64), (9, 2080)])
def test_blocks_with_minimums(isa, kind, shape):  # noqa: F811
    check(blocks(kind, *shape), tokens=(1, 2, 5, 8, 9, 70))


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (17, 1280), (270, 256)])
def test_points(isa, kind, shape):  # noqa: F811
    check(blocks(kind, *shape), tokens=(1, 2, 5, 8, 9, 17))


@pytest.mark.parametrize("kind", [*AFFINE, *POINTS])
@pytest.mark.parametrize("sign", [1, -1])
def test_at_their_ends(isa, kind, sign):  # noqa: F811
    packed = blocks(kind, 20, 1024, extreme=True)
    x = np.full((10, 1024), sign, np.float32)
    x[1::2, ::3] *= -1
    for tokens in (1, 4, 10):
        same(native.multiply(matrix(packed), x[:tokens].copy(), 1), packed.product(x[:tokens]))


@pytest.mark.parametrize("kind", POINTS)
def test_points_need_their_whole_table(kind):
    packed = blocks(kind, 4, 512)
    codes, table = packed.arrays["codes"].reshape(-1), packed.arrays["table"].reshape(-1)
    with pytest.raises(ValueError, match="needs a table"):
        native.Matrix(**packed.keywords(), codes=codes)
    with pytest.raises(ValueError, match=f"this matrix needs {len(table)}"):
        native.Matrix(**packed.keywords(), codes=codes, table=table[:-1].copy())


@pytest.mark.parametrize("kind", HALVES_AT)
@pytest.mark.parametrize("number", [0x7C00, 0xFC00, 0x7E01, 0x8000, 0x0001, 0xFBFF], ids=hex)
def test_any_bytes_are_the_same_everywhere(kind, number):
    """Blocks of random bytes, whose numbers are infinite, none, or at the ends of float16."""
    size, rows = BYTES[kind], 21
    columns = 640 if kind in AFFINE else 1280
    count = columns // (32 if kind in AFFINE else 256)
    random = np.random.default_rng(84)
    codes = random.integers(0, 256, (rows, count, size), dtype=np.uint8)
    numbers = np.exp2(random.uniform(-20, -4, (rows, count, 2))).astype(np.float16)
    numbers.view(np.uint16)[3, 1], numbers.view(np.uint16)[20, count - 1] = number, number
    for index, at in enumerate(HALVES_AT[kind]):
        codes[:, :, at : at + 2] = numbers[:, :, index, None].view(np.uint8)
    keywords = {"kind": kind, "rows": rows, "columns": columns, "group": blocks(kind, 1, 256).group}
    if kind in POINTS:
        keywords["table"] = blocks(kind, 1, 256).arrays["table"].reshape(-1)
    weight, x, before = native.Matrix(**keywords, codes=codes.reshape(-1)), inputs(20, columns), native.isa()
    found = {}
    for name in native.isas():
        native.use_isa(name)
        found[name] = [native.multiply(weight, x[:tokens].copy(), 1) for tokens in (1, 7, 20)]
    native.use_isa(before)
    for parts in found.values():
        for part, expected in zip(parts, found["scalar"], strict=True):
            np.testing.assert_array_equal(part, expected)
    assert np.isfinite(found["scalar"][0][:, 4:20]).all()
    if number in (0x7C00, 0xFC00, 0x7E01):
        assert not np.isfinite(found["scalar"][0][:, [3, 20]]).any()


@pytest.mark.parametrize("group", [16, 32, 48, 64])
@pytest.mark.parametrize(
    "ends", [(0, 15), (0, 64), (-32, 31), (-32, 32), (-64, 65), (-64, 66), (-128, 127), (-128, -128), (127, 127)]
)
def test_panels_of_codes_between(isa, ends, group):  # noqa: F811
    """Panels are multiplied by how great their numbers are: at each limit, with all inputs at their ends too."""
    packed = Maker(85).integer8(33, 4 * group, group)
    codes = np.random.default_rng(86).integers(ends[0], ends[1] + 1, (33, 4 * group)).astype(np.int8)
    codes[:, :4] = ends[1]
    codes[:, 4:8] = ends[0]
    packed.arrays["codes"], packed.values = codes, codes.astype(np.int64)
    check(packed, tokens=(9, 14))
    x = np.full((12, 4 * group), 1, np.float32)
    x[1::2] *= -1
    codes[:, :] = ends[1]
    packed.values = codes.astype(np.int64)
    same(native.multiply(matrix(packed), x, 1), packed.product(x))


def test_every_kind_of_blocks_is_tried():
    assert set(HALVES_AT) == {*SUPERBLOCKS, *AFFINE, *POINTS} == set(BYTES)
    assert all(packed_matrices.POINTS[kind].name == kind.upper() for kind in POINTS)


@pytest.mark.parametrize(
    "shape", [(8, 256, 32), (25, 1130, 64), (17, 2250, 128), (40, 290, 32), (16, 300, 16), (19, 600, 64)]
)
@pytest.mark.parametrize("scale_type", ["float16", "bfloat16", "float32"])
def test_eight_rows_of_eight_groups(isa, shape, scale_type):  # noqa: F811
    """One token meets eight rows at a time, as far as there are eight groups; panels begin anywhere."""
    maker, tokens = Maker(87), (1, 3, 19)
    check(maker.integer4(*shape, scale_type=scale_type), tokens)
    check(maker.integer4(*shape, zeros=True, scale_type=scale_type), tokens)
    check(maker.integer4(*shape, zeros=True, scale_type=scale_type, one_scale=True), tokens)
    check(maker.integer8(*shape, scale_type=scale_type), tokens)
    for shared in ("tensor", "row", "group"):
        check(maker.codebook(4, *shape, scale_type, shared), tokens)
