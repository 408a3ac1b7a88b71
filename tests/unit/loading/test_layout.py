"""Experts one by one, under the Hub's names or stacked: the layout on the disk decides, and both are the same model."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import ROUTED, block_weights, random_weights, tiny_config

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.safetensors_file import read_header
from quern.checkpoint.streaming.source import Manifest, Shard, ShardFolder, StreamedTensor, StreamSource
from quern.core.errors import BadFileError, UserError
from quern.loading.fitting import fitted, open_model

HUB = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
LAYOUTS = [(family, layout) for family in ROUTED for layout in ("blocks", "stacked")]
LAYOUTS += [("mixtral", "hub"), ("mixtral", "hub stacked")]


def stored(config: dict, layout: str) -> dict:
    """The same weights as a checkpoint of that layout holds them."""
    state = random_weights(config) if "stacked" in layout else block_weights(config)
    if "hub" not in layout:
        return {name: tensor.contiguous() for name, tensor in state.items()}
    names = {name: re.sub(r"(experts\.\d+\.)(\w+)", lambda m: m[1] + HUB[m[2]], name) for name in state}
    return {names[name].replace(".mlp.", ".block_sparse_moe."): tensor.contiguous() for name, tensor in state.items()}


def write(folder, config: dict, tensors: dict):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_every_layout_is_read_under_the_names_of_blocks(family, layout, tmp_path):
    config = tiny_config(family, num_hidden_layers=2)
    checkpoint = open_model(write(tmp_path / "model", config, stored(config, layout)))
    wanted = block_weights(config)
    assert set(checkpoint.names()) == set(wanted)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert torch.equal(checkpoint.read(name), tensor)
        info = checkpoint.info(name)
        assert (info.shape, info.stored_bytes) == (tuple(tensor.shape), tensor.nbytes)
        assert checkpoint.source.plain(name)
        with checkpoint.source.place(name).open("rb") as file:  # whoever maps the file finds the same numbers there
            file.seek(info.begin)
            assert file.read(info.stored_bytes) == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_some_blocks_may_be_dense(tmp_path):
    config = tiny_config("qwen3_moe", mlp_only_layers=[0], decoder_sparse_step=2, num_hidden_layers=4)
    architecture = architecture_of(config)
    assert [block.experts_per_token for block in architecture.blocks] == [0, 2, 0, 2]
    checkpoint = open_model(write(tmp_path / "model", config, stored(config, "stacked")))
    assert checkpoint.info("model.layers.2.mlp.up_proj.weight").shape == (96, 64)
    assert checkpoint.info("model.layers.3.mlp.experts.3.up_proj.weight").shape == (32, 64)


def test_no_experts_at_all_is_a_dense_model(tmp_path):
    config = tiny_config("qwen3_moe", num_experts=0, num_hidden_layers=1)
    assert architecture_of(config).block(0).experts_per_token == 0
    open_model(write(tmp_path / "model", config, stored(config, "blocks")))


def test_two_layouts_at_once_are_refused_by_a_name_of_each(tmp_path):
    config = tiny_config("mixtral", num_hidden_layers=2)
    one, other = stored(config, "hub"), stored(config, "stacked")
    mixed = {name: tensor for name, tensor in one.items() if ".layers.0." in name or ".layers." not in name}
    mixed |= {name: tensor for name, tensor in other.items() if ".layers.1." in name}
    with pytest.raises(
        UserError, match=r"two ways: 'model\.layers\.1\.mlp\.experts\..* and 'model\.layers\.0\.block_sp"
    ):
        open_model(write(tmp_path / "model", config, mixed))


MISSING = {
    ("qwen3_moe", "blocks"): "model.layers.1.mlp.experts.2.down_proj.weight",
    ("qwen2_moe", "stacked"): "model.layers.1.mlp.experts.down_proj",
    ("mixtral", "hub"): "model.layers.0.block_sparse_moe.experts.3.w3.weight",
    ("qwen2_moe", "blocks"): "model.layers.0.mlp.shared_expert_gate.weight",
}


@pytest.mark.parametrize("case", MISSING, ids=" ".join)
def test_missing_experts_are_refused_by_their_stored_name(case, tmp_path):
    config = tiny_config(case[0], num_hidden_layers=2)
    tensors = stored(config, case[1])
    del tensors[MISSING[case]]
    with pytest.raises(BadFileError, match=re.escape(f"tensor '{MISSING[case]}' is missing")):
        open_model(write(tmp_path / "model", config, tensors))


@pytest.mark.parametrize(
    ("layout", "changes", "problem"),
    [
        ("blocks", {"num_experts": 5}, r"tensor 'model\.layers\.0\.mlp\.experts\.4\.down_proj\.weight' is missing"),
        (
            "blocks",
            {"num_experts": 3},
            r"tensor 'model\.layers\.0\.mlp\.experts\.3\.\w+\.weight' is not part of such a",
        ),
        (
            "stacked",
            {"num_experts": 5},
            r"experts\.down_proj' has shape \(4, 64, 32\), the config calls for \(5, 64, 32\)",
        ),
        ("stacked", {"moe_intermediate_size": 16}, r"has shape \(4, 64, 32\), the config calls for \(4, 64, 16\)"),
        (
            "stacked",
            {"mlp_only_layers": [1]},
            r"tensor 'model\.layers\.1\.mlp\.experts\.down_proj' is not part of such",
        ),
        (
            "blocks",
            {"decoder_sparse_step": 2},
            r"tensor 'model\.layers\.0\.mlp\.experts\.0\.\w+\.weight' is not part of",
        ),
        (
            "blocks",
            {"num_experts_per_tok": 5},
            r"num_experts_per_tok must be an integer from 1 to the 4 experts, got 5",
        ),
        ("blocks", {"num_experts_per_tok": 0}, r"num_experts_per_tok 0; it must be an integer from 1"),
        ("blocks", {"decoder_sparse_step": 0}, r"decoder_sparse_step 0; it must be an integer from 1"),
        ("blocks", {"num_experts": 2**31}, r"num_experts 2147483648; it must be an integer from 1 to 4096"),
        (
            "blocks",
            {"layer_types": ["full_attention", "linear_attention"]},
            r"layer 1 'linear_attention'; known for qwen2_moe: full_",
        ),
    ],
)
def test_configurations_that_the_weights_do_not_fit(layout, changes, problem, tmp_path):
    config = tiny_config("qwen2_moe", num_hidden_layers=2)
    folder = write(tmp_path / "model", config, stored(config, layout))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")
    with pytest.raises((BadFileError, UserError), match=problem):
        open_model(folder)


def test_a_stream_reads_the_bytes_of_one_expert(tmp_path, monkeypatch):
    config = tiny_config("qwen3_moe", num_hidden_layers=1)
    folder = write(tmp_path / "model", config, stored(config, "stacked"))
    path = folder / "model.safetensors"
    tensors = {
        name: StreamedTensor(shard=path.name, dtype=info.dtype, shape=info.shape)
        for name, info in read_header(path).items()
    }
    shard = Shard(size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    manifest = Manifest(repository="a/b", revision="0" * 40, shards={path.name: shard}, tensors=tensors)
    source = StreamSource(folder / "stream.json", manifest, ShardFolder(folder, manifest))
    checkpoint = fitted(Checkpoint(folder, config, source))
    assert not checkpoint.at_hand
    sizes = []

    def noted(path, info):
        from quern.checkpoint.safetensors_file import read_tensor

        sizes.append(info.stored_bytes)
        return read_tensor(path, info)

    monkeypatch.setattr("quern.checkpoint.streaming.source.read_tensor", noted)
    for name, tensor in block_weights(config).items():
        assert torch.equal(checkpoint.source.read(name), tensor)
        assert sizes.pop() == tensor.nbytes
