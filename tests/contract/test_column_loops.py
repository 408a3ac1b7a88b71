"""Native loops over columns against the plain ones: for every codec that has them, and on every instruction set."""

import pytest
import torch
from schemes import ALL, gaussian, make_codec, scheme_id

from quern import _native
from quern.quantization.rounding.columns import NativeLoop, PlainLoop, loop_of

COLUMNS = 48
SOME = [s for s in ALL if s.get("granularity") in ("channel", "block") or s.get("group_size") == 32]
GRIDS = [s for s in SOME if make_codec(s).encoder(gaussian(4, 8), gaussian(4, 8), refit=False).native_columns()]
ISAS = [name for name in ("avx2", "avx512") if name in _native.isas()]


def test_grids_of_integers_and_of_listed_numbers_have_them():
    assert {"integer", "nf4", "log"} <= {scheme.get("codec", "integer") for scheme in GRIDS}


def encoders(scheme: dict, rows: int) -> tuple[torch.Tensor, list]:
    weight, codec = gaussian(rows, COLUMNS), make_codec(scheme)
    found = [codec.encoder(weight, weight, refit=False) for _ in range(2)]
    return weight.T.contiguous(), found


def square(near: float) -> torch.Tensor:
    """Symmetric and positive definite, of which few numbers make up for many."""
    mixed = gaussian(COLUMNS, COLUMNS, 3) * near + torch.eye(COLUMNS)
    return mixed @ mixed.T


def same_codes(first, second) -> None:
    """Sums in another order differ by some 1e-6 of their size, so that of thousands of numbers hardly one lies between; from
    that on its row goes another way, as good as this one."""
    assert float((first.codes == second.codes).all(0).float().mean()) > 0.95


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("scheme", GRIDS, ids=scheme_id)
def test_one_column_after_the_other(scheme, rows):
    original, (plain, native) = encoders(scheme, rows)
    inside, places = 0.2 * gaussian(COLUMNS, COLUMNS, 4), gaussian(1, COLUMNS, 5)[0].argsort().tolist()
    for encoder, fast in ((plain, False), (native, True)):
        target, done, rounded = original.clone(), torch.zeros_like(original), torch.zeros_like(original)
        loop = loop_of(encoder, places, fast)
        assert isinstance(loop, NativeLoop if fast else PlainLoop)
        for first, last in ((0, 7), (7, 8), (8, COLUMNS)):
            loop.feed_forward(first, last, inside, original, target, done, rounded)
        assert torch.equal(done, original - rounded)
        value = original + inside.tril(-1) @ done
        # Sums of at most 48 products of which none is above 8, whatever their order: 48 x 49 / 2 roundings of 2^-24 x 48.
        assert torch.allclose(target, value - rounded, rtol=0, atol=48 * 49 / 2 * 2**-24 * float(value.abs().max()))
    same_codes(plain, native)


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("scheme", GRIDS, ids=scheme_id)
def test_all_columns_anew(scheme, rows):
    weight, (plain, native) = encoders(scheme, rows)
    hessian, losses = square(0.3), []
    for encoder, fast in ((plain, False), (native, True)):
        rounded = torch.stack([encoder.round(k, weight[k][None])[0] for k in range(COLUMNS)])
        residual = hessian @ (rounded - weight)
        loop = loop_of(encoder, range(COLUMNS), fast)
        for first, last in ((0, 20), (20, COLUMNS)):
            loop.sweep(first, last, hessian, rounded, residual)
        error = rounded - weight
        expected = hessian @ error
        assert torch.allclose(residual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        losses.append(float((error.double() * (hessian.double() @ error.double())).sum()))
    same_codes(plain, native)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("scheme", GRIDS, ids=scheme_id)
def test_exact_sums_give_the_same_bits(scheme):
    """Of whole numbers times a power of two no order of additions rounds."""
    original, (plain, native) = encoders(scheme, 40)
    original = (original * 64).round() / 64
    inside = torch.zeros(COLUMNS, COLUMNS)
    found = []
    for encoder, fast in ((plain, False), (native, True)):
        target, done, rounded = original.clone(), torch.zeros_like(original), torch.zeros_like(original)
        loop_of(encoder, range(COLUMNS), fast).feed_forward(0, COLUMNS, inside, original, target, done, rounded)
        found += [target, done, rounded, encoder.codes]
    for one, other in zip(found[:4], found[4:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", GRIDS, ids=scheme_id)
def test_every_instruction_set_gives_the_same_bits(scheme, isa):
    original, (first, second) = encoders(scheme, 50)
    inside, places = 0.2 * gaussian(COLUMNS, COLUMNS, 4), torch.arange(COLUMNS, dtype=torch.int32).numpy()
    found = []
    for encoder, name in ((first, "scalar"), (second, isa)):
        grid = encoder.grid.numbers()
        own = (part.numpy() for part in (encoder.codes, encoder.scale, encoder.zero))
        listed = (part.numpy() for part in (grid.limits, grid.numbers, grid.codes))
        columns = _native.Columns(*own, encoder.group, grid.count, *listed, name)
        target, done, rounded = original.clone(), torch.zeros_like(original), torch.zeros_like(original)
        given = (part.numpy() for part in (inside, original, target, done, rounded))
        columns.feed_forward(places, 0, COLUMNS, *given)
        residual = square(0.3) @ (rounded - original)
        columns.sweep(places, 0, COLUMNS, square(0.3).numpy(), rounded.numpy(), residual.numpy())
        found += [target, done, rounded, residual, encoder.codes]
    for one, other in zip(found[:5], found[5:], strict=True):
        assert torch.equal(one, other)


def test_arrays_of_another_shape_are_refused():
    encoder = encoders({"bits": 4, "granularity": "channel"}, 4)[1][0]
    loop = loop_of(encoder, range(COLUMNS), True)
    matrix, square_ = torch.zeros(COLUMNS, 4), torch.eye(COLUMNS)
    with pytest.raises(ValueError, match="no such columns"):
        loop.sweep(0, COLUMNS + 1, square_, matrix, matrix)
    with pytest.raises(ValueError, match="its columns, rows"):
        loop.sweep(0, 1, square_, torch.zeros(COLUMNS, 5), matrix)
    with pytest.raises(ValueError, match="square"):
        loop.sweep(0, 1, torch.zeros(COLUMNS, 5), matrix, matrix)
    with pytest.raises(ValueError, match="no such column"):
        loop_of(encoder, [COLUMNS], True).sweep(0, 1, torch.eye(1), matrix[:1], matrix[:1])
    with pytest.raises(ValueError, match="groups, rows"):
        _native.Columns(
            encoder.codes.numpy(), encoder.scale[:, :3].contiguous().numpy(), encoder.zero.numpy(), COLUMNS, 16,
            *(torch.empty(0, dtype=dtype).numpy() for dtype in (torch.float32, torch.float32, torch.uint8)),
        )  # fmt: skip
