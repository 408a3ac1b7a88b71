"""Sets of rows that are rounded one after the other: every row once, and joined as if the matrix had been rounded whole."""

import pytest
import torch
from schemes import ALL, gaussian, make_codec, scheme_id

from quern.codecs.base import decode
from quern.core.machine.parallel import Workers
from quern.core.recipe_parts import Rounding as Settings
from quern.quantization.rounding.factor import factorize
from quern.quantization.rounding.gptq import Gptq
from quern.quantization.rounding.row_feedback import SETS, OutputHessian

ROWS = (1, 20, 96, 130, 256, 300, 1100, 4200)
"""One tile of a trellis and parts of it, several, and so many that tiles themselves are the sets."""


@pytest.mark.parametrize("scheme", ALL, ids=scheme_id)
def test_they_are_all_rows_and_not_too_many(scheme):
    for rows in ROWS:
        sets = make_codec(scheme).row_sets(rows, SETS)
        assert torch.equal(torch.cat([some for some, _ in sets]).sort().values, torch.arange(rows)), rows
        assert all(len(some) for some, _ in sets), rows
        assert len(sets) <= 2 * SETS, rows


@pytest.mark.parametrize("rows", [20, 320])
@pytest.mark.parametrize("scheme", ALL, ids=scheme_id)
def test_sets_joined_are_the_matrix_that_was_rounded_whole(scheme, rows):
    """Rows do not know each other, so that rounding them set by set changes nothing."""
    codec, weight = make_codec(scheme), gaussian(rows, 40)
    parts, expected = [], torch.empty_like(weight)
    for some, own in codec.row_sets(rows, 4):
        encoder = own.encoder(weight[some], weight, refit=False)
        expected[some] = encoder.round_all(weight[some])
        parts.append(encoder.parts())
        assert torch.equal(own.decode((len(some), 40), parts[-1]), expected[some])
    joined = codec.join_sets(rows, parts)
    assert {name: (tuple(p.shape), p.dtype) for name, p in joined.items()} == codec.part_shapes((rows, 40))
    assert torch.equal(codec.decode((rows, 40), joined), expected)
    if scheme.get("granularity") == "block" or rows % 16:
        return  # a block of the rows of two sets has two scales; lanes of a trellis that are shorter than others are filled up
    whole = codec.encoder(weight, weight, refit=False)
    assert torch.equal(whole.round_all(weight), expected)


def seen(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hessian of inputs, and gradients that move a few directions of the outputs most."""
    inputs = gaussian(4 * columns, columns, 1) @ (torch.eye(columns) + gaussian(columns, columns, 2) / columns**0.5)
    gradients = gaussian(200, 12, 3) @ gaussian(12, rows, 4) + 0.3 * gaussian(200, rows, 5)
    return inputs.T @ inputs, gradients


@pytest.mark.parametrize("scheme", [s for s in ALL if make_codec(s).describe().bits < 8], ids=scheme_id)
def test_rows_make_up_for_those_before(scheme):
    rows, columns = 200, 32
    (inputs, gradients), weight, codec = seen(rows, columns), gaussian(rows, columns), make_codec(scheme)
    outputs = gradients.T @ gradients
    losses = []
    for given in (None, OutputHessian([outputs.triu()], 0.1)):
        factor = factorize(inputs.clone(), 0.01, False, Workers(1), keep=True)
        found = Gptq(Settings(sweeps=1)).round(weight, codec, factor, Workers(1), given)
        assert torch.equal(decode(found.weight), found.decoded)
        change = (found.decoded - weight).double()
        losses.append(float(((outputs.double() @ change @ inputs.double()) * change).sum()))
    assert losses[1] < 0.8 * losses[0]


def test_threads_do_not_change_a_byte():
    (inputs, gradients), weight, found = seen(300, 48), gaussian(300, 48), []
    codec = make_codec({"bits": 3, "symmetric": False, "granularity": "group", "group_size": 16})
    for threads in (1, 2, 3):
        pool = Workers(threads)
        factor = factorize(inputs.clone(), 0.01, False, pool)
        found.append(
            Gptq(Settings())
            .round(weight, codec, factor, pool, OutputHessian([(gradients.T @ gradients).triu()], 0.1))
            .decoded
        )
        pool.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
