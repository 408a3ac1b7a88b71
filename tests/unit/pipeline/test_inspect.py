"""Inspecting folders: every weight once, bytes that add up to the file."""

import json
import math
import re
import shutil

import pytest
import torch
from bad_files import corpus
from gguf import GGMLQuantizationType

from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.safetensors_file import write_safetensors
from quern.core.errors import BadFileError, UserError
from quern.core.recipe import Recipe, parse_recipe
from quern.pipeline.inspect import Inspection, inspect
from quern.pipeline.quantize import quantize

QUERY, DOWN, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"
MIXED = {
    "name": "mixed",
    "weights": {"codec": "none", "granularity": "tensor"},
    "overrides": [
        {"pattern": QUERY, "bits": 3, "group_size": 20, "symmetric": False},
        {"pattern": DOWN, "bits": 8, "granularity": "tensor"},
    ],
    "embedding": {"bits": 8, "granularity": "channel"},
    "rounding": {"method": "nearest"},
    "calibration": {"token_weight": "none"},
}
STATIC = {
    "name": "static",
    "weights": {"bits": 8, "granularity": "channel"},
    "activations": {"mode": "static"},
    "rounding": {"method": "nearest"},
    "calibration": {"tokens": 64, "sequence_length": 32, "token_weight": "none"},
}


def recipe(data) -> Recipe:
    return parse_recipe(data, "test")


@pytest.fixture(scope="module")
def mixed(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "artifact"
    quantize(tiny_model, folder, recipe=recipe(MIXED), threads=1)
    return folder


def check_sums(found: Inspection):
    """What must hold for every folder: weights counted once, bytes of all tensors and of all files."""
    checkpoint = open_checkpoint(found.path)
    assert sum(row.bytes for row in found.tensors) == sum(i.stored_bytes for i in checkpoint.source.infos.values())
    assert found.bytes == sum(path.stat().st_size for path in found.path.iterdir())
    assert math.isclose(found.bits_per_weight, 8 * sum(row.bytes for row in found.tensors) / found.parameters)
    assert len({row.name for row in found.tensors}) == len(found.tensors)


def test_unquantized_folder(tiny_model):
    found = inspect(tiny_model)
    check_sums(found)
    assert found.recipe is None
    assert found.parameters == open_checkpoint(tiny_model).parameters
    assert {(row.codec, row.granularity, row.bits) for row in found.tensors} == {("bf16", "-", 16)}


def test_artifact(tiny_model, mixed):
    found = inspect(mixed)
    check_sums(found)
    rows = {row.name: row for row in found.tensors}
    query, down, embedding = (rows[f"{module}.weight"] for module in (QUERY, DOWN, EMBEDDING))
    assert (query.shape, query.codec, query.granularity, query.bits) == ((64, 64), "integer", "group 20", 3)
    # 64 codes of 3 bits take 6 words, along a row as codes and down the rows as zero points; 4 groups, float16 scales.
    assert query.bytes == 64 * 6 * 4 + 64 * 4 * 2 + 4 * 6 * 4
    assert (down.shape, down.granularity, down.bits, down.bytes) == ((64, 96), "tensor", 8, 64 * 96 + 2)
    assert (embedding.shape, embedding.granularity, embedding.bytes) == ((300, 64), "channel", 300 * 64 + 300 * 2)
    assert found.recipe == "mixed"
    assert found.parameters == open_checkpoint(tiny_model).parameters


def test_scales_of_inputs_are_bytes_but_no_parameters(tiny_model, tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh" * 20)
    quantize(tiny_model, tmp_path / "out", recipe=recipe(STATIC), calibration=[tmp_path / "text.txt"], threads=1)
    found = inspect(tmp_path / "out")
    check_sums(found)
    scales = [row for row in found.tensors if row.name.endswith("input_scale")]
    assert len(scales) == 3 * 7
    assert {row.bytes for row in scales} == {4}
    assert found.parameters == open_checkpoint(tiny_model).parameters


def test_gguf(tmp_path):
    file = corpus.write_gguf(tmp_path / "m.gguf", corpus.weights(), corpus.CONFIG, GGMLQuantizationType.Q8_0)
    found = inspect(file)
    assert found.bytes == file.stat().st_size
    rows = {row.name: row for row in found.tensors}
    down = rows["model.layers.1.mlp.down_proj.weight"]
    # A block of 32 weights is 34 bytes.
    assert (down.codec, down.granularity, down.bits) == ("q8_0", "-", 8.5)
    assert rows["model.norm.weight"].codec == "f32"


def test_layers_are_in_the_order_of_numbers(tiny_model):
    names = [row.name for row in inspect(tiny_model).tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "model.norm.weight"


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
        },
        "group_1": {
            "targets": ["re:.*down_proj$"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None},
        },
        "group_2": {"targets": ["lm_head"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
    },
}


def write_compressed(folder, config):
    folder.mkdir()
    tensors = {
        "a.q_proj.weight_packed": torch.zeros(6, 5, dtype=torch.int32),
        "a.q_proj.weight_scale": torch.zeros(6, 3, dtype=torch.bfloat16),
        "a.q_proj.weight_shape": torch.tensor([6, 35]),
        "a.q_proj.weight_zero_point": torch.zeros(1, 3, dtype=torch.int32),
        "a.down_proj.weight": torch.zeros(6, 7, dtype=torch.int8),
        "a.down_proj.weight_scale": torch.zeros(6, 1, dtype=torch.bfloat16),
        "a.down_proj.input_scale": torch.zeros(1),
        "lm_head.weight": torch.zeros(6, 7, dtype=torch.float8_e4m3fn),
        "lm_head.weight_scale": torch.zeros(1),
        "norm.weight": torch.zeros(6, dtype=torch.bfloat16),
    }
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return folder


def test_compressed_tensors(tmp_path):
    found = inspect(write_compressed(tmp_path / "model", COMPRESSED))
    check_sums(found)
    assert [(r.name, r.shape, r.codec, r.granularity, r.bits, r.bytes) for r in found.tensors] == [
        ("a.down_proj.input_scale", (1,), "f32", "-", 32, 4),
        ("a.down_proj.weight", (6, 7), "integer", "channel", 8, 42 + 12),
        ("a.q_proj.weight", (6, 35), "integer", "group 16", 4, 120 + 36 + 16 + 12),
        ("lm_head.weight", (6, 7), "float", "tensor", 8, 42 + 4),
        ("norm.weight", (6,), "bf16", "-", 16, 12),
    ]
    assert found.parameters == 42 + 210 + 42 + 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config_groups": None}, "config_groups"),
        ({"config_groups": {"group_0": {"targets": ["lm_head"], "weights": {"num_bits": 4}}}}, "covers module"),
    ],
)
def test_compressed_tensors_that_contradict_themselves(tmp_path, change, said):
    with pytest.raises(BadFileError, match=said):
        inspect(write_compressed(tmp_path / "model", COMPRESSED | change))


def damaged(source, folder, change):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format_version=99), "version 99"),
        (lambda c: c.pop("modules"), "damaged"),
        (lambda c: c["modules"][DOWN].update(bits=99), "damaged"),
        (lambda c: c["modules"][DOWN]["weights"].update(bits=99), "damaged"),
        (lambda c: c["modules"][DOWN]["weights"].update(codec="abacus"), "abacus"),
        (lambda c: c["modules"].update({"model.nowhere": c["modules"][DOWN]}), "model.nowhere"),
        (lambda c: c["modules"].update({"model.layers.0.mlp.up_proj": c["modules"][DOWN]}), "up_proj.codes"),
    ],
)
def test_artifacts_that_contradict_themselves(mixed, tmp_path, change, said):
    folder = damaged(mixed, tmp_path / "artifact", change)
    with pytest.raises(UserError, match=said):
        inspect(folder)


UNREAD = {
    "auto-round": {
        "config": {"quant_method": "auto-round", "bits": 4, "group_size": 32},
        "parts": lambda rows, columns: {
            "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            "qzeros": torch.zeros(columns // 32, -(-rows // 8), dtype=torch.int32),
            "scales": torch.zeros(columns // 32, rows, dtype=torch.float16),
            "g_idx": torch.zeros(columns, dtype=torch.int32),
        },
        "bits": 4,
        "says": "quantized to 4 bits by auto-round",
    },
    "quark": {
        "config": {"quant_method": "quark", "bits": 4, "group_size": 32},
        "parts": lambda rows, columns: {
            "qweight": torch.zeros(columns, -(-rows // 8), dtype=torch.int32),
            "qzeros": torch.zeros(columns // 32, -(-rows // 8), dtype=torch.int32),
            "scales": torch.zeros(columns // 32, rows, dtype=torch.float16),
        },
        "bits": 4,
        "says": "quantized to 4 bits by quark",
    },
    "fbgemm_fp8": {
        "config": {"quant_method": "fbgemm_fp8", "weight_block_size": [128, 128]},
        "parts": lambda rows, columns: {
            "weight": torch.zeros(rows, columns).to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.ones(1, 1),
        },
        "bits": 8,
        "says": "quantized by fbgemm_fp8",
    },
    "modelopt": {
        "config": {"quant_method": "modelopt", "load_in_4bit": True},
        "parts": lambda rows, columns: {
            "weight": torch.zeros(rows * columns // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.zeros(rows * columns // 64),
            "weight.quant_map": torch.zeros(16),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
        },
        "bits": 4,
        "says": "quantized to 4 bits by modelopt",
    },
}


@pytest.mark.parametrize("method", UNREAD)
def test_what_other_tools_quantized_is_counted_by_the_models_own_shapes(method, tiny_model, tmp_path):
    foreign = UNREAD[method]
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = {name: open_checkpoint(folder).read(name) for name in open_checkpoint(folder).names()}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": value for part, value in foreign["parts"](rows, columns).items()}
    write_safetensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": foreign["config"]}
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    check_sums(found)
    assert found.parameters == open_checkpoint(tiny_model).parameters
    rows = {row.name: row for row in found.tensors}
    assert (rows[f"{DOWN}.weight"].shape, rows[f"{DOWN}.weight"].codec) == ((64, 96), method)
    assert rows[f"{DOWN}.weight"].bits == foreign["bits"]
    assert rows[f"{QUERY}.bias"].codec == "bf16"
    assert set(rows) == {row.name for row in inspect(tiny_model).tensors}
    assert [note.startswith(foreign["says"]) for note in found.notes] == [True]


def test_a_model_that_does_not_fit_is_shown_with_what_does_not(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    check_sums(found)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("it cannot be run or quantized: ")
    assert "the weights have 3 layers" in found.notes[0]
    assert inspect(tiny_model).notes == ()


def test_a_gguf_of_rounded_weights_says_so(tmp_path):
    whole = corpus.write_gguf(tmp_path / "f32.gguf", corpus.weights(), corpus.CONFIG)
    assert inspect(whole).notes == ()
    (note,) = inspect(corpus.good_gguf(tmp_path / "q8.gguf")).notes
    # A block of 32 weights is 34 bytes, and norms are float32.
    assert re.search(r"q8\.gguf were rounded before, to 8\.[56] bits each \(Q8_0\)", note)


def test_an_unknown_method_shows_what_is_stored(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "other"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert {row.codec for row in inspect(folder).tensors} == {"bf16"}
