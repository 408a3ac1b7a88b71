"""Plans for GGUF: bytes are those of the file, and of all its parts; rows that are no whole super-blocks are planned too."""

from __future__ import annotations

import pytest
from tiny_model import tiny_config, write_model

from quern.core.allocation import Target
from quern.core.errors import UserError
from quern.core.recipe import load_recipe
from quern.core.text.units import bytes_text
from quern.pipeline.planning.plan import plan
from quern.pipeline.quantize import quantize

WIDTHS = {"whole super-blocks": 256, "none": 288}
NARROW = ("down_proj", "o_proj")
"""Linears whose rows are 256 in both."""
DIGITS, SUMMARY = 4, 4 * 110
"""Bytes that the text of a linear's error, and those of what calibration says of a block's inputs, may be shorter by."""


def small(target: Target):
    recipe = load_recipe("auto-gguf").targeting(target)
    kinds = ("q3_k", "iq4_xs", "q4_k", "q6_k")
    assert recipe.allocation is not None
    candidates = tuple(one for one in recipe.allocation.candidates if one.scheme.params.type in kinds)
    allocation = recipe.allocation.model_copy(update={"candidates": candidates, "rows": 64})
    calibration = recipe.calibration.model_copy(update={"tokens": 256, "sequence_length": 64})
    return recipe.model_copy(update={"allocation": allocation, "calibration": calibration})


@pytest.mark.parametrize("rows", WIDTHS)
def test_bytes_are_those_of_the_file(rows, tiny_text, tmp_path):
    width = WIDTHS[rows]
    config = tiny_config("llama", hidden_size=width, intermediate_size=256, num_hidden_layers=2, head_dim=64)
    model = write_model(tmp_path / "model", config)
    given = {"calibration": [tiny_text], "cache": tmp_path / "cache", "threads": 1}
    report = plan(model, recipe=small(Target(bits=5.6)), format="gguf", **given)
    slack = DIGITS * len(report.matrices) + SUMMARY * 2 + 64
    kinds = {matrix.scheme["type"] for matrix in report.matrices if not matrix.name.endswith(NARROW)}
    super_blocks = {kind for kind in kinds if kind.endswith(("_k", "_xs"))}
    assert bool(super_blocks) == (width == 256)
    sizes = {}
    for options in ({}, {"shard-size": "100KB"}):
        file = tmp_path / f"{len(options)}.gguf"
        done = quantize(model, file, recipe=report.recipe, format_options=options, **given)
        predicted = plan(model, recipe=small(Target(bits=5.6)), format="gguf", format_options=options, **given).bytes
        assert 0 <= predicted - done.bytes <= slack + 300 * 12 * len(options)
        assert done.bits_per_weight == report.bits_per_weight <= 5.6
        sizes[len(options)] = done.bytes
    assert sizes[0] < sizes[1]
    below = Target(bytes=report.bytes - 1)
    fitted = quantize(model, tmp_path / "fit.gguf", recipe=small(below), format="gguf", **given)
    assert report.bytes - 1 - 0.1 * report.bytes < fitted.bytes < report.bytes
    with pytest.raises(UserError, match="bytes 10 kB cannot be met"):
        plan(model, recipe=small(Target(bytes=10_000)), format="gguf", **given)
    assert bytes_text(10_000) == "10 kB"
