"""Mixes: their types against those that llama-quantize gave the same models, and what becomes of a recipe that names one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mix_types import MODELS, in_short
from tiny_model import tiny_config

from quern.architectures.base import architecture_of
from quern.checkpoint.gguf.names import gguf_name
from quern.core.errors import UserError
from quern.core.recipe import MIXES, Recipe, load_recipe, parse_recipe
from quern.formats.mixes.base import more_bits, scheme_of, settled
from quern.pipeline.blockwise.job import plan_of

TABLE = json.loads((Path(__file__).resolve().parents[2] / "golden" / "llama_cpp_mixes.json").read_text("utf-8"))
"""By model and mix, what llama-quantize of llama-cpp-python 0.3.36 made with an importance matrix: written by
``tests/llama_cpp_mixes.py``."""

ROUTER = "ffn_gate_inp"


def named(recipe: str, **keys: object) -> Recipe:
    return parse_recipe({"name": "x", "mix": recipe, **keys}, "x")


def planned(recipe: Recipe, config: dict[str, object]) -> dict[str, str]:
    plan = plan_of(recipe, architecture_of(config))
    return in_short({gguf_name(f"{name}.weight"): one.scheme.params.type for name, one in plan.items()})


@pytest.mark.parametrize("model", MODELS)
def test_types_are_those_of_llama_quantize(model):
    assert set(TABLE[model]) == set(MIXES.names())
    for name, expected in TABLE[model].items():
        kept = {key: expected[key] for key in expected.keys() & {"file_type", ROUTER}}
        assert {**planned(named(name), MODELS[model]), **kept} == expected
        assert kept.get(ROUTER, "").startswith("f32") == ("experts" in model), "no matrix that a mix is for"


def test_the_table_tells_mixes_and_models_apart():
    """Or the test above would hold whatever the rules were."""
    for mixes in TABLE.values():
        kinds = [json.dumps({key: value for key, value in one.items() if key != "file_type"}) for one in mixes.values()]
        assert len(set(kinds)) >= len(kinds) - 1  # q2_k_s may have nothing to raise
    values = {model: mixes["q4_k_m"]["attn_v"] for model, mixes in TABLE.items()}
    assert values["llama, 80 layers, 4 heads of 1"] != values["llama, 80 layers, 4 heads of 4"]


def test_layers_with_more_bits():
    assert [index for index in range(16) if more_bits(index, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert [index for index in range(3) if more_bits(index, 3)] == [2]


def test_a_settled_recipe_says_everything_itself():
    config = MODELS["qwen2, 8 layers, 4 heads of 2"]
    recipe = load_recipe("q4_k_m")
    found = settled(recipe, architecture_of(config))
    assert "mix" not in found.to_json()
    assert parse_recipe(found.to_json(), "x") == found
    assert planned(found, config) == planned(recipe, config)
    assert settled(found, architecture_of(config)) == found
    assert parse_recipe(recipe.to_json(), "x") == recipe


def test_overrides_of_the_recipe_come_after_the_mix():
    config = MODELS["qwen2, 8 layers, 4 heads of 2"]
    override = {"pattern": "*.0.mlp.down_proj", "codec": "ggml", "type": "q8_0"}
    plan = plan_of(named("q4_k_m", overrides=[override]), architecture_of(config))
    assert plan["model.layers.0.mlp.down_proj"].scheme == scheme_of("q8_0")
    assert plan["model.layers.7.mlp.down_proj"].scheme == scheme_of("q6_k")


def test_rows_that_are_no_whole_super_blocks_get_what_fits():
    plan = plan_of(named("q4_k_m"), architecture_of(tiny_config(num_hidden_layers=8)))
    assert plan["model.layers.0.mlp.down_proj"].scheme == scheme_of("q8_0")
    assert plan["model.layers.1.mlp.down_proj"].scheme == scheme_of("q5_0")


def test_refusals():
    with pytest.raises(UserError, match="unknown mix 'q4_k_x'; known: iq2_m.*did you mean"):
        named("q4_k_x")
    with pytest.raises(UserError, match="mix q4_k_m says what weights becomes; leave one of the two out"):
        named("q4_k_m", weights={"bits": 4})
    candidates = {"candidates": [{"codec": "ggml", "type": "q4_k"}], "target": {"bits": 4}}
    with pytest.raises(UserError, match="a mix says of each linear what an allocation would choose"):
        named("q4_k_m", allocation=candidates)
