"""The tool that makes checkpoints of any shape: sizes of known models, a model that quantizes, and shards of the same numbers."""

import json
import sys

import pytest
import torch
from test_tools import load
from tiny_model import tiny_config

import quern
from quern.checkpoint.checkpoint import open_checkpoint
from quern.engines.reference import load as load_model


@pytest.fixture(scope="module")
def tool():
    return load("tools/make_synthetic_checkpoint.py")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-72b", 72_706_203_648),
        ("llama-3-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_known_models_have_as_many_parameters_as_their_makers_say(tool, tmp_path, name, parameters):
    checkpoint = open_checkpoint(tool.make(tmp_path / "a", tool.KNOWN[name]))
    assert checkpoint.parameters == parameters
    assert sum(path.stat().st_size for path in checkpoint.files) < 1_000_000, "nothing of that lies on the disk"


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_what_is_drawn_and_what_is_written_quantize_to_the_same_bytes(tool, tmp_path, monkeypatch, family):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(tiny_config(family, initializer_range=0.02)), "utf-8")
    for folder, more in (("drawn", []), ("written", ["--shards"])):
        monkeypatch.setattr(sys, "argv", ["tool", str(config), str(tmp_path / folder), "--layers", "2", *more])
        tool.main()
    drawn, written = open_checkpoint(tmp_path / "drawn"), open_checkpoint(tmp_path / "written")
    assert drawn.names() == written.names()
    assert all(torch.equal(drawn.read(name), written.read(name)) for name in drawn.names())
    made = [quern.quantize(tmp_path / f, tmp_path / f"{f}-q", recipe="rtn4") for f in ("drawn", "written")]
    assert made[0].bytes == made[1].bytes
    names = sorted(path.name for path in (tmp_path / "drawn-q").glob("*.safetensors"))
    assert names
    for name in names:
        assert (tmp_path / "drawn-q" / name).read_bytes() == (tmp_path / "written-q" / name).read_bytes()


def test_some_activations_are_massive_and_outlier_channels_stay(tool, tmp_path):
    config = tiny_config("qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=4, head_dim=64)
    folder = tool.make(tmp_path / "a", config)
    model = load_model(folder, dtype="float32").model
    found = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _module, _given, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
    model(torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(1)))
    first, second = (states.reshape(64, -1).abs() for states in found[:2])
    assert first.max() < 30 * first.median()
    assert second[:8].max() > 50 * second.median()
    assert len(set(second.max(dim=1).indices[second.max(dim=1).values > 50 * second.median()].tolist())) == 1, (
        "one channel"
    )
    weights = [open_checkpoint(folder).read(f"model.layers.{layer}.input_layernorm.weight") for layer in range(4)]
    largest = [set(weight.topk(tool.OUTLIERS).indices.tolist()) for weight in weights]
    assert all(channels == largest[0] for channels in largest), "the same channels in every block"
