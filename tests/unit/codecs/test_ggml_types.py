"""ggml's block types: what is stored is what gguf's decoders read, and scales lose no more than they must."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from schemes import gaussian, make_codec, round_by_column
from tiny_model import tiny_config

from quern.architectures.base import architecture_of
from quern.codecs.blocks import grids
from quern.codecs.blocks import super as supers
from quern.codecs.blocks.types import INSTEAD, TYPES
from quern.codecs.blocks.vectors import PointEncoder
from quern.core.errors import UserError
from quern.core.machine.parallel import Workers
from quern.core.recipe import load_recipe, parse_recipe
from quern.core.recipe_parts import Rounding as Settings
from quern.pipeline.blockwise.job import plan_of, stand_in_note
from quern.quantization.rounding.factor import factorize
from quern.quantization.rounding.gptq import Gptq

ROWS, COLUMNS = 24, 512
SUPER = sorted(INSTEAD)


def codec_of_type(name):
    return make_codec({"codec": "ggml", "type": name})


def unit(rows=ROWS, columns=COLUMNS, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def kind_of(name):
    return gguf.GGMLQuantizationType[name.upper()]


@pytest.mark.parametrize("name", TYPES)
def test_the_decoders_of_gguf_read_every_value(name):
    """Rows of very different sizes, an outlier, and what error feedback does: columns in turn, scales fitted on the way."""
    codec, weight = codec_of_type(name), gaussian(ROWS, COLUMNS)
    encoder = codec.encoder(weight, weight, refit=True)
    values = round_by_column(encoder, weight)
    parts = codec.join([encoder.parts()])
    form, blocks = codec.ggml((ROWS, COLUMNS)), codec.ggml_blocks((ROWS, COLUMNS), parts)
    assert (form.kind, form.notes, blocks.rounded) == (kind_of(name).name, (), 0)
    assert np.array_equal(dequantize(blocks.data.numpy(), kind_of(name)), values.numpy())
    assert torch.equal(codec.decode((ROWS, COLUMNS), parts), values)
    block, size = gguf.GGML_QUANT_SIZES[kind_of(name)]
    assert blocks.data.shape == (ROWS, COLUMNS // block * size)
    assert sum(part.nbytes for part in parts.values()) == blocks.data.numel()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_rounding_to_nearest_loses_less_than_the_package_gguf(name):
    """Whose encoders take the scale from the ends of a block; a fitted one loses a tenth less, of eight bits no more."""
    codec, weight = codec_of_type(name), unit()
    encoder = codec.encoder(weight, weight, refit=False)
    ours = float((encoder.round_all(weight) - weight).square().mean())
    theirs = dequantize(quantize(weight.numpy(), kind_of(name)), kind_of(name))
    assert ours <= (1.0 if name == "q8_0" else 0.9) * float(((theirs - weight.numpy()) ** 2).mean())


BAND = {"q2_k": (0.060, 0.072), "q3_k": (0.018, 0.0215), "q4_k": (0.0045, 0.0052), "q5_k": (0.0011, 0.00127),
        "q6_k": (0.00022, 0.00029), "iq4_nl": (0.0048, 0.0056), "iq4_xs": (0.0048, 0.0056),
        "iq2_xxs": (0.095, 0.115), "iq2_xs": (0.072, 0.086), "iq2_s": (0.052, 0.061), "iq3_xxs": (0.029, 0.034),
        "iq3_s": (0.0150, 0.0178)}  # fmt: skip
"""Mean squared errors on a unit Gaussian. Of uniform grids a twelfth of the step squared is the least: with a range of about
+-1.9 for 16 weights and +-2.1 for 32, (3.8 / 2^b)^2 / 12 and (4.2 / 2^b)^2 / 12, less what clipping gains. Of points of a grid
no less than 4^-b for the b bits of codes and scales (Shannon), 0.057 for 2.06 and 0.0085 for 3.44, and no more than twice that."""


@pytest.mark.parametrize("name", BAND)
def test_losses_on_a_gaussian_lie_in_a_band(name):
    codec, weight = codec_of_type(name), unit(64, 512)
    encoder = codec.encoder(weight, weight, refit=False)
    low, high = BAND[name]
    assert low <= float((encoder.round_all(weight) - weight).square().mean()) <= high


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "q6_k", "q3_k"])
def test_a_negative_scale_reaches_the_long_end_on_the_other_side(name):
    """One block whose greatest value is positive: mirrored, it loses exactly as much."""
    codec, weight = codec_of_type(name), unit(8, 256).abs() ** 2 - 0.3
    losses = []
    for sign in (1, -1):
        encoder = codec.encoder(sign * weight, sign * weight, refit=False)
        losses.append(float((encoder.round_all(sign * weight) - sign * weight).square().sum()))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert bool((codec.encoder(weight, weight, refit=False).scale < 0).any())


@pytest.mark.parametrize("name", ["q4_1", "q4_k", "q2_k", "q6_k", "iq4_nl", "iq2_xxs", "iq3_s"])
def test_columns_that_cost_more_lose_less(name):
    codec, weight = codec_of_type(name), unit(32, 256)
    importance = torch.where(torch.arange(256) % 4 == 0, 50.0, 1.0)
    losses = []
    for weights in (torch.ones(256), importance):
        encoder = codec.encoder(weight, weight, refit=True)
        for first in range(0, 256, encoder.refit_width):
            columns = slice(first, first + encoder.refit_width)
            encoder.refit(first, weight[:, columns].T, weights[columns])
        width = encoder.width
        tuples = [slice(first, first + width) for first in range(0, 256, width)]
        metric = torch.diag(weights)
        rounded = torch.cat([encoder.round_within(at.start, weight[:, at].T, metric[at, at]) for at in tuples]).T
        losses.append(float(((rounded - weight).square() * importance).sum()))
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    "name", ["q4_0", "q4_1", "iq4_nl", "q2_k", "q4_k", "q6_k", "iq4_xs", "iq2_xxs", "iq2_s", "iq3_xxs"]
)
def test_error_feedback_loses_much_less_than_rounding_to_nearest(name):
    """By the Hessian of correlated inputs. Of a super-block, which is the whole row here, scales are frozen before its first
    column is rounded, so that less is left to gain."""
    weight, mixing = unit(32, 256), torch.eye(256) + unit(256, 256, 2) / 8
    inputs = unit(1024, 256, 3) @ mixing
    hessian = inputs.T @ inputs
    codec = codec_of_type(name)
    factor = factorize(hessian.clone(), 0.01, False, Workers(1), keep=True)
    found = Gptq(Settings()).round(weight, codec, factor, Workers(1))
    plain = codec.encoder(weight, weight, refit=False).round_all(weight) - weight
    change = found.decoded - weight
    most = 0.8 if name in SUPER else 0.6
    assert float((change @ hessian * change).sum()) < most * float((plain @ hessian * plain).sum())


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q6_k", "iq4_xs", "iq2_xs", "iq3_s"])
def test_sub_blocks_fitted_once_more_lose_less(name, monkeypatch):
    """Under error feedback their columns are no longer what they were when the super-block was fitted."""
    weight, inputs = unit(32, 512), unit(1024, 512, 3) @ (torch.eye(512) + unit(512, 512, 2) / 12)
    losses = []
    for once in (False, True):
        if once:
            for encoder in (supers.SuperEncoder, PointEncoder):
                monkeypatch.setattr(encoder, "refine", lambda *arguments: None)
        factor = factorize(inputs.T @ inputs, 0.01, False, Workers(1), keep=True)
        losses.append(Gptq(Settings()).round(weight, codec_of_type(name), factor, Workers(1)).loss)
    assert losses[0] < 0.97 * losses[1]


def test_refitting_a_super_block_never_loses_more():
    """Each step keeps what it found only where the weighted error falls; by the plain sum over sub-blocks."""
    values, importance = unit(16, 256).view(16, 8, 32), torch.rand(8, 32, generator=torch.Generator().manual_seed(5))
    kind = supers.TYPES["Q4_K"]
    grid, found = kind.grid(), None
    found = supers._fitted(grid, kind, values, importance)
    before = supers._losses(grid, found.scale, found.minimum, values, importance).sum(1)
    supers._refit_super(grid, found, values, importance)
    between = supers._losses(grid, found.scale, found.minimum, values, importance).sum(1)
    supers._step(grid, kind, found, values, importance)
    after = supers._losses(grid, found.scale, found.minimum, values, importance).sum(1)
    assert bool((between <= before).all())
    assert bool((after <= between).all())
    whole = supers._rounded(grid, found.scale, found.minimum, values)
    assert torch.allclose(((whole - values) ** 2 * importance).sum((1, 2)), after, rtol=1e-5)


def test_a_fitted_scale_is_no_worse_than_a_search_over_many():
    """Of 2000 scales of either sign the best, for each block; fitting tries ten starts and comes within 3 % of it."""
    grid, values = grids.SymmetricGrid(4, 32), unit(50, 32)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.1
    scale, zero = grid.fit(values, importance)
    fitted = grids.weighted_error(values, grid.decode(grid.encode(values, scale, zero), scale, zero), importance)
    best = torch.full_like(fitted, torch.inf)
    for size in torch.linspace(0.05, 0.6, 1000):
        for sign in (1, -1):
            tried = torch.full_like(scale, float(sign * size))
            best = torch.minimum(
                best,
                grids.weighted_error(values, grid.decode(grid.encode(values, tried, zero), tried, zero), importance),
            )
    assert float((fitted / best).mean()) < 1.03


@pytest.mark.parametrize("name", TYPES)
def test_weights_beyond_float16_are_refused(name):
    weight = torch.full((2, 256), 1e30)
    with pytest.raises(UserError, match="too large for scales in scale_dtype float16"):
        codec_of_type(name).encoder(weight, weight, refit=False)


@pytest.mark.parametrize("name", SUPER)
def test_rows_that_are_no_super_blocks_get_the_type_that_takes_them(name):
    codec = codec_of_type(name)
    assert codec.fitting((8, 512)) == codec.scheme
    instead = codec.fitting((8, 288))
    assert instead.params.type == INSTEAD[name]
    assert isinstance(codec.ggml((8, 288)), str)
    assert not isinstance(make_codec(instead.to_json()).ggml((8, 288)), str)


def test_the_plan_says_what_stands_in():
    architecture = architecture_of(tiny_config("llama", hidden_size=256, head_dim=64, intermediate_size=288))
    recipe = load_recipe("q4_k")
    plan = plan_of(recipe, architecture)
    assert plan["model.layers.0.mlp.up_proj"].scheme.params.type == "q4_k"
    assert plan["model.layers.0.mlp.down_proj"].scheme.params.type == "q5_0"
    (note,) = stand_in_note(recipe, plan, architecture)
    assert (
        note
        == "3 matrices with rows of 288 weights are stored as ggml, type q5_0, because these do not fit ggml, type q4_k"
    )
    assert (
        stand_in_note(load_recipe("q4_0"), plan_of(load_recipe("q4_0"), architecture), architecture)
        == [
            # embedding and head are super-blocks, which 256 divides
        ]
    )


def test_unknown_types_and_keys_are_refused_with_the_known_ones():
    for keys, said in (({"type": "q4_x"}, "q4_k"), ({"type": "q4_k", "bits": 4}, "bits")):
        with pytest.raises(UserError, match=said):
            parse_recipe({"name": "x", "weights": {"codec": "ggml", **keys}}, "x")


def test_grids_that_are_not_installed_are_said_to_be_missing(monkeypatch):
    form = codec_of_type("iq2_xs").kernel((4, 256))
    assert form.kind == "iq2_xs"
    assert len(form.options["table"]) == 512 * 8
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert codec_of_type("iq2_xs").kernel((4, 256)) == (
        "it has the grid of IQ2_XS from the package gguf, which is not installed"
    )
