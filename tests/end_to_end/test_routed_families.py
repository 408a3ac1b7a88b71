"""Families with experts over variants of their configuration: the reference engine and artifacts against transformers."""

import json

import pytest
import torch
from artifacts import INT8, make_artifact
from tiny_model import ROUTED, tiny_config, write_model
from transformers import AutoModelForCausalLM

from quern.core.errors import UserError
from quern.engines.base import engine_for
from quern.engines.cpu import CpuEngine
from quern.engines.reference import load
from quern.loading.fitting import open_model

IDS = torch.randint(0, 296, (2, 40), generator=torch.Generator().manual_seed(4))
FLOAT32 = 2e-5
"""Sums of up to 96 terms carry 96 x 2^-24 = 6e-6; stacks are added up in another order, and a router is not discontinuous where
its scores are not that close."""
VARIANTS = {
    "mixtral": ("mixtral", {}),
    "mixtral, untied, one key head": ("mixtral", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "mixtral, window": ("mixtral", {"sliding_window": 16}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, not renormalized": ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    "qwen3_moe, first blocks dense": ("qwen3_moe", {"mlp_only_layers": [0, 1], "head_dim": 32}),
    "qwen3_moe, every second": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3_moe, window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
    "qwen3_moe, all experts": ("qwen3_moe", {"num_experts_per_tok": 4}),
    "qwen3_moe, one expert": ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True, "num_experts": 7}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, no bias": ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, "tie_word_embeddings": False}),
    "qwen2_moe, dense and routed": ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 4}),
    "qwen2_moe, window": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
         "num_hidden_layers": 4},
    ),
    "qwen2_moe, gelu": ("qwen2_moe", {"hidden_act": "gelu"}),
}  # fmt: skip


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def by_transformers(folder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_engine_computes_what_transformers_does(variant, tmp_path):
    family, changes = VARIANTS[variant]
    folder = write_model(tmp_path / "model", tiny_config(family, torch_dtype="float32", **changes), tokenizer=False)
    assert difference(load(folder, dtype="float32").logits(IDS), by_transformers(folder)) < FLOAT32


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe, first blocks dense", "qwen2_moe, dense and routed"])
def artifact(request, tmp_path_factory, tiny_text):
    """An artifact of mixed schemes: some experts as they are, some of three bits, all inputs rotated."""
    folder = tmp_path_factory.mktemp("routed")
    family, changes = VARIANTS[request.param]
    model = write_model(folder / "model", tiny_config(family, torch_dtype="float32", **changes))
    overrides = [
        {"pattern": "*.experts.0.*", "codec": "none"},
        {"pattern": "*.experts.1.*", "codec": "integer", "bits": 3, "group_size": 16},
    ]
    choices = {"weights": {"bits": 4, "group_size": 32}, "rounding": {"method": "gptq"}, "overrides": overrides}
    return make_artifact(
        model, folder / "out", tiny_text, embedding=INT8, transforms=[{"method": "hadamard"}], **choices
    )


def test_transformers_loads_artifacts(artifact):
    assert difference(load(artifact, dtype="float32").logits(IDS), by_transformers(artifact)) < FLOAT32


def test_each_expert_is_stored_as_the_recipe_says(artifact):
    modules = json.loads((artifact / "config.json").read_text())["quantization_config"]["modules"]
    stored = {
        name: modules[name]["weights"]["bits"] for name in modules if "layers.2.mlp" in name or "layers.1.mlp" in name
    }
    experts = {name: bits for name, bits in stored.items() if ".experts." in name}
    assert experts
    assert all(bits == (3 if ".experts.1." in name else 4) for name, bits in experts.items())
    assert not any(".experts.0." in name or name.endswith((".gate", "shared_expert_gate")) for name in modules)


@pytest.mark.parametrize("family", ROUTED)
def test_which_engine_runs_it(family, tmp_path):
    folder = write_model(tmp_path / "model", tiny_config(family), tokenizer=False)
    if CpuEngine().runs(open_model(folder)) is None:
        pytest.skip("the cpu engine runs the family: its own tests say how well")
    assert engine_for(open_model(folder)) == "reference"
    with pytest.raises(UserError, match=f"does not send tokens to experts, as blocks of {family} do.*auto"):
        engine_for(open_model(folder), "cpu")
    with pytest.raises(UserError, match="does not send tokens to experts"):
        CpuEngine().load(folder)
