"""The two helpers that adapters share for what lies in an artifact's folder."""

import numpy as np
from safetensors.numpy import save_file

from quern.peers.transformers_model import copy_tokenizer, dense_matrices


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path):
    model, artifact = tmp_path / "model", tmp_path / "artifact"
    for folder in (model, artifact):
        folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "config.json", "model.safetensors"):
        (model / name).write_text(f"model's {name}")
    (artifact / "tokenizer_config.json").write_text("the tool's own")
    copy_tokenizer(model, artifact)
    assert sorted(path.name for path in artifact.iterdir()) == ["merges.txt", "tokenizer.json", "tokenizer_config.json"]
    assert (artifact / "tokenizer_config.json").read_text() == "the tool's own"
    assert (artifact / "tokenizer.json").read_text() == "model's tokenizer.json"


def test_dense_matrices_are_named_and_counted(tmp_path):
    half = np.zeros((4, 4), np.float16)
    first = {
        "model.embed_tokens.weight": half,
        "model.layers.0.self_attn.q_proj.weight": half,
        "model.layers.0.input_layernorm.weight": np.zeros(4, np.float16),
        "model.layers.0.mlp.up_proj.weight": np.zeros((4, 4), np.int8),
        "model.layers.0.mlp.up_proj.weight_scale": half,
    }
    save_file(first, tmp_path / "a.safetensors")
    save_file({"model.layers.11.self_attn.q_proj.weight": half}, tmp_path / "b.safetensors")
    assert dense_matrices(tmp_path) == "not quantized: model.embed_tokens, 2 x model.layers.*.self_attn.q_proj"


def test_an_artifact_without_dense_matrices_says_so(tmp_path):
    save_file({"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 4), np.int32)}, tmp_path / "a.safetensors")
    assert dense_matrices(tmp_path) == "not quantized: nothing"
