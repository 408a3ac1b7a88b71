"""The page on other tools' checkpoints names every method that is read, both READMEs lead to it, and what it says of taking
codes over is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from artifacts import small_recipe
from foreign_models import VARIANTS, Variant, awq, compressed, fp8, gptq, write_foreign
from gguf import GGMLQuantizationType
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model

from quern.checkpoint.foreign.base import FOREIGN
from quern.codecs.base import CODECS
from quern.core.recipe import parse_recipe
from quern.engines.base import ENGINES
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/foreign.md").read_text("utf-8")
IDS = torch.tensor([[1, 5, 17, 40, 95, 0, 3, 64]])
INTEGERS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
SOURCES: dict[str, list[Variant] | GGMLQuantizationType] = {
    "GPTQ with `sym: true`": [gptq(4, 128, sym=True)],
    "GPTQ with `sym: false`, AWQ": [gptq(4, 128), awq(128)],
    "GPTQ or AWQ with `group_size: -1`": [gptq(4, -1), awq(-1)],
    "compressed-tensors, integers, `strategy: channel`": [VARIANTS["compressed-tensors int8"]],
    "compressed-tensors, scales in float32": [compressed(INTEGERS, "pack-quantized", "group 32", torch.float32)],
    "FP8 with a scale for each row": [VARIANTS["fp8 channel"], VARIANTS["compressed-tensors fp8 channel"]],
    "FP8 with blocks of 128 x 128": [fp8([128, 128])],
    "compressed-tensors, MXFP4": [VARIANTS["compressed-tensors mxfp4"]],
    "GGUF, Q8_0": GGMLQuantizationType.Q8_0,
    "GGUF, Q4_0": GGMLQuantizationType.Q4_0,
}


def test_every_method_has_a_line():
    assert set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)) == {"quant_method", *FOREIGN.names()}


def test_the_readmes_lead_there():
    for name in ("README.md", "README.zh-CN.md"):
        assert "(docs/foreign.md)" in (ROOT / name).read_text("utf-8")


def test_the_recipe_takes_an_awq_checkpoint_over(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    recipe = parse_recipe(yaml.safe_load(text), "docs/foreign.md")
    assert not recipe.needs_calibration
    source = write_foreign(tmp_path / "model", awq(128), hidden_size=256, head_dim=64)
    report = quantize(source.folder, tmp_path / "out", recipe=recipe)
    assert {layer.relative_error for layer in report.layers} == {0.0}
    ours, theirs = (
        ENGINES.get("reference")().load(p, dtype="float32").logits(IDS) for p in (report.path, source.folder)
    )
    assert torch.equal(ours, theirs)


SCHEMES = dict(re.findall(r"^\| (.+?) \| `(\{.*\})` \|$", PAGE, re.MULTILINE))


def test_every_source_of_the_table_is_tried():
    assert set(SCHEMES) == set(SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_the_schemes_of_the_table_take_their_sources_over(source, tmp_path):
    made = SOURCES[source]
    if isinstance(made, GGMLQuantizationType):
        model = write_model(tmp_path / "model", tiny_config("llama", num_hidden_layers=1))
        models = write_gguf(model, tmp_path / "model.gguf", kind=made)
    else:
        models = [
            write_foreign(tmp_path / str(number), variant, num_hidden_layers=1).folder
            for number, variant in enumerate(made)
        ]
    recipe = small_recipe(weights=yaml.safe_load(SCHEMES[source]), rounding={"method": "stored"})
    for number, model in enumerate(models):
        layers = quantize(model, tmp_path / f"out{number}", recipe=recipe).layers
        assert [layer.relative_error for layer in layers] == [0.0] * 7


def test_codecs_that_take_values_are_named_with_recipes():
    (line,) = re.findall(
        r"^\| `method` \| `\"gptq\"` \|(.*)$", (ROOT / "docs/recipes.md").read_text("utf-8"), re.MULTILINE
    )
    able = [name for name in CODECS.names() if CODECS.get(name).takes_values]
    assert set(re.findall(r"`(\w+)`", line.partition("with codec")[2])) == set(able)
