"""What the CPU engine demands of an artifact's tensors: none missing, none too many, any alignment."""

import json
import shutil

import pytest
import torch
from artifacts import INT8, small_recipe, stored_tensors
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.core.errors import BadFileError, UserError
from quern.engines.cpu import CpuEngine
from quern.engines.reference import load as load_reference
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (1, 40), generator=torch.Generator().manual_seed(5))
ROTATED = [{"method": "hadamard"}]
NEAREST = {"method": "nearest"}
FOUR = {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 32}
KINDS = {
    "4 bits": {"weights": FOUR},
    "8 bits, float32 scales": {"weights": {"bits": 8, "granularity": "channel", "scale_dtype": "float32"}},
    "3 bits": {"weights": {**FOUR, "bits": 3}},
    "trellis": {"weights": {"codec": "trellis", "bits": 2}, "transforms": ROTATED},
    "bfloat16": {"weights": {"codec": "none"}},
}


def load(path):
    return CpuEngine().load(path, threads=1)


def change(folder, to, edit):
    """A copy of ``folder`` whose shards' tensors went through ``edit``."""
    shutil.copytree(folder, to)
    for shard in sorted(to.glob("*.safetensors")):
        save_file(edit(load_file(shard)), shard, metadata={"format": "pt"})
    (to / "model.safetensors.index.json").unlink(missing_ok=True)
    return reindexed(to)


def reindexed(folder):
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) > 1:
        places = {name: shard.name for shard in shards for name in load_file(shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def without(end):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def added(after, name, tensor):
    """Adds ``<linear>.<name>`` to the shard that holds the linear whose name ends in ``after``."""

    def edit(tensors):
        found = [key.rsplit(".", 1)[0] for key in tensors if key.rsplit(".", 1)[0].endswith(after)]
        return {**tensors, **{f"{linear}.{name}": tensor for linear in sorted(set(found))}}

    return edit


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """An artifact with rotated inputs of each family, made when it is asked for."""
    made = {}

    def artifact(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source = write_model(folder / "model", tiny_config(family, torch_dtype="float32"))
            recipe = small_recipe(weights=FOUR, embedding=INT8, rounding=NEAREST, transforms=ROTATED)
            made[family] = quantize(source, folder / "out", recipe=recipe, threads=1).path
        return made[family]

    return artifact


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("llama", "q_proj.input_signs"),
        ("qwen2", "down_proj.input_signs"),
        ("qwen2", "k_proj.bias"),
        ("llama", "o_proj.bias"),
        ("qwen3", "q_norm.weight"),
        ("qwen3", "k_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named_by_both_engines(family, end, families, tmp_path):
    broken = change(families(family), tmp_path / "out", without(end))
    with pytest.raises(UserError, match=rf"layers\.0\..*{end}"):
        load_reference(broken)
    with pytest.raises(BadFileError, match=rf"tensor 'model\.layers\.0\..*{end}' is missing"):
        load(broken)


@pytest.mark.parametrize(
    ("family", "after", "name", "tensor"),
    [
        ("qwen2", "layers.1.self_attn.o_proj", "bias", torch.ones(64)),
        ("mistral", "layers.0.self_attn.q_proj", "bias", torch.ones(64)),
        ("llama", "layers.2.self_attn", "q_norm.weight", torch.ones(16)),
        ("qwen2", "layers.2.self_attn", "k_norm.weight", torch.ones(16)),
        ("qwen2", "embed_tokens", "input_signs", torch.ones(8, dtype=torch.uint8)),
    ],
)
def test_a_tensor_too_many_is_named(family, after, name, tensor, families, tmp_path):
    def edit(tensors):
        place = added(after, name, tensor)
        if "norm" not in name:
            return place(tensors)
        here = any(after + "." in key for key in tensors)
        return {**tensors, f"model.{after}.{name}": tensor} if here else tensors

    broken = change(families(family), tmp_path / "out", edit)
    with pytest.raises(BadFileError, match=rf"{after}\.{name}' is not part of such a model"):
        load(broken)


def test_signs_that_the_artifact_does_not_speak_of_are_refused(families, tmp_path):
    plain = shutil.copytree(families("qwen2"), tmp_path / "out")
    config = json.loads((plain / "config.json").read_text())
    for module in config["quantization_config"]["modules"].values():
        module["rotated"] = False
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFileError, match=r"input_signs' is not part of such a model"):
        load(plain)
    stripped = change(plain, tmp_path / "stripped", without(".input_signs"))
    assert torch.isfinite(load(stripped).logits(IDS)).all()


def test_linears_that_stay_as_they_are_need_no_signs(tmp_path):
    source = write_model(tmp_path / "model", tiny_config(torch_dtype="float32"))
    overrides = [{"pattern": "*.o_proj", "codec": "none"}]
    recipe = small_recipe(weights=FOUR, rounding=NEAREST, transforms=ROTATED, overrides=overrides)
    artifact = quantize(source, tmp_path / "out", recipe=recipe, threads=1).path
    assert not any(name.endswith("o_proj.input_signs") for name in stored_tensors(artifact))
    assert torch.isfinite(load(artifact).logits(IDS)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_any_alignment_gives_the_same_logits(kind, tmp_path):
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    source = write_model(tmp_path / "model", tiny_config(torch_dtype=dtype))
    if kind == "bfloat16":
        artifact = source
    else:
        recipe = small_recipe(embedding=INT8, rounding=NEAREST, **KINDS[kind])
        artifact = quantize(source, tmp_path / "out", recipe=recipe, threads=1).path
    expected = load(artifact).logits(IDS)
    for padding in (1, 2):
        shifted = shutil.copytree(artifact, tmp_path / f"shifted {padding}")
        for shard in shifted.glob("*.safetensors"):
            data = shard.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            shard.write_bytes((end - 8 + padding).to_bytes(8, "little") + data[8:end] + b" " * padding + data[end:])
        assert torch.equal(load(shifted).logits(IDS), expected)
