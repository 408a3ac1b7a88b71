"""The cpu engine on families whose blocks send tokens to experts: against transformers, and by itself."""

import functools
import itertools

import pytest
import torch
from artifacts import INT8, small_recipe
from tiny_model import tiny_config, write_model
from transformers import AutoModelForCausalLM

from quern import _native
from quern.checkpoint.checkpoint import open_checkpoint
from quern.core.errors import UserError
from quern.engines.base import engine_for
from quern.engines.cpu import CpuEngine
from quern.engines.reference import load as load_reference
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (2, 70), generator=torch.Generator().manual_seed(4))
# Sums of up to 96 float32 terms carry 96 x 2^-24 = 6e-6; about 30 of them follow each other in three blocks.
FLOAT32 = 2e-4
MANY = {"num_experts": 12, "num_experts_per_tok": 5}
VARIANTS = {
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, weights that add up to 1": ("qwen2_moe", {"norm_topk_prob": True, **MANY}),
    "qwen2_moe, every other block dense": ("qwen2_moe", {"decoder_sparse_step": 2, "tie_word_embeddings": False}),
    "qwen2_moe, windows": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 3},
    ),
    "qwen3_moe": ("qwen3_moe", MANY),
    "qwen3_moe, weights as they are": ("qwen3_moe", {"norm_topk_prob": False, "head_dim": 32}),
    "qwen3_moe, first block dense": ("qwen3_moe", {"mlp_only_layers": [0], "num_key_value_heads": 1}),
    "qwen3_moe, one expert a token": ("qwen3_moe", {"num_experts_per_tok": 1, "hidden_act": "gelu"}),
    "mixtral": ("mixtral", {}),
    "mixtral, windows": ("mixtral", {"sliding_window": 16, "tie_word_embeddings": False}),
    "mixtral, all experts": ("mixtral", {"num_experts_per_tok": 4}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def divergence(first, second):
    """Mean KL divergence in nats a token."""
    ours, theirs = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def load(path, **options):
    return CpuEngine().load(path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("routed")

    @functools.cache
    def made(variant, dtype="float32"):
        family, changes = VARIANTS[variant]
        config = tiny_config(family, torch_dtype=dtype, initializer_range=0.2, **changes)
        return write_model(root / f"{variant} {dtype}", config)

    return made


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_texts_are_those_of_transformers(variant, dtype, folder):
    model = folder(variant, dtype)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS, use_cache=False).logits
    assert engine_for(open_checkpoint(model)) == "cpu"
    assert difference(load(model, cache="float32").logits(IDS), expected) < FLOAT32
    assert difference(load_reference(model, dtype="float32").logits(IDS), expected) < FLOAT32


@every_variant
def test_a_token_reads_the_bytes_of_its_experts(variant, folder):
    """Both engines count the same of float32 weights; and fewer than all."""
    model = folder(variant)
    ours, theirs = load(model).bytes_per_token(), load_reference(model).bytes_per_token()
    assert ours == theirs
    assert (ours < (model / "model.safetensors").stat().st_size * 0.9) == (variant != "mixtral, all experts")


# Artifacts

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
FIRST = {"num_hidden_layers": 1, **MANY}
ARTIFACTS = {
    "4 bits": ("qwen2_moe", FIRST, {"weights": {"bits": 4, "symmetric": False, "group_size": 32}}),
    "8 bits": ("qwen3_moe", FIRST, {"weights": INT8}),
    "codebooks": ("mixtral", {}, {"weights": {"codec": "nf4", "group_size": 32}}),
    "trellis, rotated": (
        "qwen3_moe",
        {"num_experts": 5, "num_hidden_layers": 1, "moe_intermediate_size": 64},
        {"weights": {"codec": "trellis", "bits": 3}, "transforms": [{"method": "hadamard"}]},
    ),
    "ggml": ("mixtral", {**WIDE, "num_hidden_layers": 1}, {"weights": {"codec": "ggml", "type": "q3_k"}}),
    "static inputs": (
        "qwen2_moe",
        {"num_hidden_layers": 1},
        {"weights": INT8, "activations": {"mode": "static"}},
    ),
    "experts unlike each other": (
        "qwen2_moe",
        FIRST,
        {
            "weights": {"bits": 4, "group_size": 32},
            "overrides": [
                {"pattern": "*.experts.[0-3].*", "codec": "none"},
                {"pattern": "*.experts.[4-6].down_proj", "bits": 8, "granularity": "channel"},
                {"pattern": "*.experts.7.*", "bits": 3, "group_size": 16},
            ],
        },
    ),
}
every_artifact = pytest.mark.parametrize("name", ARTIFACTS)
ROUNDED_INPUTS = 5e-3
"""Mean KL divergence that int8 inputs cost: relative errors of 2^-8, and a choice of experts here and there. What is wrong, an
expert's weights or its tokens, costs a hundred times as much."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_text):
    root = tmp_path_factory.mktemp("routed artifacts")

    @functools.cache
    def made(name):
        family, changes, choices = ARTIFACTS[name]
        model = root / f"{name} model"
        write_model(model, tiny_config(family, torch_dtype="float32", initializer_range=0.1, **changes))
        recipe = small_recipe(embedding=INT8, **choices)
        return quantize(model, root / name, recipe=recipe, calibration=[tiny_text], threads=1).path

    return made


@every_artifact
def test_packed_experts_give_what_the_reference_decodes(name, artifact):
    path = artifact(name)
    assert engine_for(open_checkpoint(path)) == "cpu"
    decoded = load_reference(path, dtype="float32").logits(IDS)
    assert 0 < divergence(decoded, load(path).logits(IDS)) < ROUNDED_INPUTS


@every_artifact
def test_bits_depend_on_neither_threads_nor_instruction_sets(name, artifact):
    path = artifact(name)
    expected = load(path, threads=1).logits(IDS)
    before = _native.isa()
    try:
        for threads, isa in itertools.product((1, 2), _native.isas()):
            _native.use_isa(isa)
            assert torch.equal(load(path, threads=threads).logits(IDS), expected), (threads, isa)
    finally:
        _native.use_isa(before)


@every_artifact
def test_texts_of_a_batch_do_not_know_each_other(name, artifact):
    """Prompts, then single tokens and guesses, of several texts at once; and a text that has another one's first pages."""
    model = load(artifact(name), threads=2)
    texts = [IDS.flatten()[:n].tolist() for n in (1, 40, 17)]
    opened = [model.open() for _ in texts]
    first = model.step(list(zip(opened, texts, strict=True)))
    second = model.step(list(zip(opened, [[5], [6, 7, 8], [9]], strict=True)), [0, 2, 0])
    rows = [second[:1], second[1:4], second[4:]]
    for text, row, more, wanted in zip(texts, first, ([5], [6, 7, 8], [9]), rows, strict=True):
        session = model.start()
        assert torch.equal(session.feed(text), row)
        for token, expected in zip(more, wanted, strict=True):
            assert torch.equal(session.feed([token]), expected)
    forked = opened[1].fork(32)
    assert forked.length == 32
    again = model.step([(forked, texts[1][32:]), (opened[0], [3])])
    assert torch.equal(again[0], first[1])


@every_artifact
def test_one_token_at_a_time_is_the_prompt_at_once(name, artifact):
    model = load(artifact(name))
    together = model.logits(IDS[:1])[0]
    session = model.start()
    assert torch.equal(torch.stack([session.feed([token]) for token in IDS[0].tolist()]), together)


def test_the_packed_modules_of_transformers_run_it(artifact):
    path = artifact("4 bits")
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(IDS, use_cache=False).logits
    assert difference(found, load_reference(path, dtype="float32").logits(IDS)) < FLOAT32


def test_routers_of_other_kinds_are_left_to_the_reference_engine(folder, monkeypatch):
    from quern.architectures.qwen3_moe import Qwen3Moe

    monkeypatch.setattr(Qwen3Moe, "softmax_router", None)
    model = folder("qwen3_moe")
    assert engine_for(open_checkpoint(model)) == "reference"
    with pytest.raises(UserError, match="does not know how qwen3_moe chooses experts"):
        load(model)
