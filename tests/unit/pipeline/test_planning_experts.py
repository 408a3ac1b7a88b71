"""Planning over experts: what each costs by how many tokens meet it, and a scheme of its own for each."""

import json
from types import SimpleNamespace

import pytest
import torch
from artifacts import small_recipe, stored_schemes
from tiny_model import block_weights, tiny_config, write_model

from quern.architectures.base import architecture_of
from quern.engines.reference import load
from quern.pipeline.planning.losses import _of_rarely_met
from quern.pipeline.planning.plan import plan
from quern.pipeline.quantize import quantize
from quern.quantization.calibration.block import Block

CANDIDATES = [{"bits": 2, "group_size": 32}, {"bits": 4, "group_size": 32}, {"bits": 8, "granularity": "channel"}]
CONFIG = tiny_config(
    "qwen3_moe", torch_dtype="float32", num_experts=8, num_experts_per_tok=1, num_hidden_layers=2, mlp_only_layers=[0],
    initializer_range=0.1,
)  # fmt: skip


def recipe(target, tokens=128):
    return small_recipe(
        "plan", allocation={"candidates": CANDIDATES, "outer": [{"bits": 8, "granularity": "channel"}], "target": target},
        rounding={"method": "gptq"},
        calibration={"tokens": tokens, "sequence_length": 32, "token_weight": "fisher"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planning")
    write_model(folder / "model", CONFIG)
    return folder


def test_each_expert_gets_its_own_scheme_within_the_target(place, tiny_text):
    report = plan(
        place / "model", recipe=recipe({"bits": 5.5}), calibration=[tiny_text], cache=place / "cache", threads=2
    )
    quantize(place / "model", place / "out", recipe=report.recipe, calibration=[tiny_text], threads=2)
    assert report.bits_per_weight <= 5.5
    schemes = stored_schemes(place / "out")
    experts = {name: scheme.params.bits for name, scheme in schemes.items() if ".experts." in name}
    assert len(experts) == 8 * 3
    assert len(set(experts.values())) > 1, "experts that more tokens meet, or that lose more, get more bits"
    ids = torch.arange(60)[None]
    assert bool(load(place / "out", dtype="float32").logits(ids).isfinite().all())
    losses = {matrix.name: matrix.loss for matrix in report.matrices}
    assert all(loss > 0 for name, loss in losses.items() if ".experts." in name), "experts that no token met count too"
    assert (
        json.loads((place / "out/config.json").read_text())["quantization_config"]["modules"].keys() == schemes.keys()
    )


def test_rarely_met_experts_cost_what_the_others_do_for_each_token():
    """Three of eight experts met enough of 128 tokens to tell; 64 inputs ask for 8 of them."""
    block = Block(architecture_of(CONFIG), 1, block_weights(CONFIG).__getitem__, torch.float32, 32)
    job = SimpleNamespace(
        recipe=recipe({"bits": 4}),
        architecture=architecture_of(CONFIG),
        sequences=torch.zeros(4, 32, dtype=torch.int64),
    )
    prefix = block.spec.prefix + "mlp.experts."
    uses = {f"{prefix}{expert}.gate_proj": use for expert, use in enumerate([0.5, 0.25, 0.125, 0, 1 / 128, 0, 0, 0.01])}
    found = {name: [8 * use, 4 * use, use] for name, use in uses.items()}
    query = block.spec.prefix + "self_attn.q_proj"
    result = _of_rarely_met(job, block, {**found, query: [0.5, 0.25, 0.125]}, {**uses, query: 1.0})
    for expert in (0, 1, 2):
        assert result[f"{prefix}{expert}.gate_proj"] == found[f"{prefix}{expert}.gate_proj"]
    assert result[query] == [0.5, 0.25, 0.125]
    assert result[f"{prefix}3.gate_proj"] == pytest.approx([8 / 128, 4 / 128, 1 / 128])
    assert result[f"{prefix}4.gate_proj"] == pytest.approx([16 / 128, 8 / 128, 2 / 128])
    nobody = dict.fromkeys(found, 0.0)
    assert _of_rarely_met(job, block, found, nobody) == found, "where none met any, there is nothing to learn from"
