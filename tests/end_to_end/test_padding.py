"""Zeros up to a multiple: the same model, the same codes where it has numbers, and its own sizes again behind."""

import json

import pytest
import torch
from artifacts import small_recipe, stored_tensors
from tiny_model import calibration_text, tiny_config, write_model
from transformers import AutoModelForCausalLM

from quern.checkpoint.safetensors_file import METADATA, write_safetensors
from quern.codecs.base import decode
from quern.core.errors import BadFileError, UserError
from quern.core.recipe_parts import Padding
from quern.engines.reference import load
from quern.loading.fitting import open_model, open_original
from quern.loading.padding import padded, unpadded
from quern.pipeline.export import _Source, export
from quern.pipeline.inspect import inspect
from quern.pipeline.quantize import quantize
from quern.pipeline.train import train

OWN, PADDED = 80, 96
PADDING = {"intermediate": 32}
WEIGHTS = {"bits": 4, "group_size": 16}
GPTQ = {"method": "gptq"}
IDS = torch.arange(40).reshape(2, 20)
SAME = {
    "integer": {"weights": WEIGHTS, "rounding": GPTQ},
    "asymmetric, in another order": {
        "weights": {**WEIGHTS, "symmetric": False}, "rounding": {**GPTQ, "activation_order": True}
    },
    "w8a8": {
        "weights": {"bits": 8, "granularity": "channel"}, "activations": {"mode": "static"}, "rounding": GPTQ,
        "transforms": [{"method": "smoothquant"}],
    },
}  # fmt: skip
OTHER = {
    "everything": {
        "weights": WEIGHTS, "rounding": {**GPTQ, "target": "drift", "sweeps": 1, "two_sided": True},
        "tuning": {"passes": 1},
    },
    "rotated": {"weights": WEIGHTS, "rounding": GPTQ, "transforms": [{"method": "hadamard"}]},
    "trellis": {"weights": {"codec": "trellis"}, "rounding": GPTQ},
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(calibration_text()[:20_000], "utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config("qwen2", intermediate_size=OWN, num_hidden_layers=2)
    return write_model(tmp_path_factory.mktemp("odd") / "model", config)


@pytest.fixture(scope="module")
def artifact(model, text, tmp_path_factory):
    return made(model, tmp_path_factory.mktemp("padded") / "out", text, padding=PADDING, **SAME["integer"])


def made(model, folder, text, **choices):
    quantize(model, folder, recipe=small_recipe(**choices), calibration=[text], threads=1)
    return folder


def decoded(folder):
    """The matrices of an artifact of format quern, as they are stored."""
    source = _Source.open(folder, "quern", True, None)
    return {name: decode(source.packed(name).weight) for name in source.stored}


def test_the_padded_model_is_the_same_for_stock_transformers(model, tmp_path):
    """Sums of products have further zeros, added in another order: a few units in the last place of float32."""
    larger = padded(open_original(model), Padding(**PADDING))
    assert larger.config["intermediate_size"] == PADDED
    assert larger.parameters == open_original(model).parameters
    tensors = {name: larger.read(name) for name in larger.names()}
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (64, PADDED)
    write_safetensors(tmp_path / "model.safetensors", tensors, METADATA)
    (tmp_path / "config.json").write_text(json.dumps(larger.config), "utf-8")
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(IDS).logits for path in (tmp_path, model)
        )
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert not torch.allclose(ours, theirs.flip(-1), rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("choices", SAME.values(), ids=list(SAME))
def test_codes_and_scales_are_those_of_the_model_itself_and_zeros_stay_zeros(choices, model, text, tmp_path):
    own = made(model, tmp_path / "own", text, **choices)
    more = made(model, tmp_path / "more", text, padding=PADDING, **choices)
    assert json.loads((more / "quern.json").read_text())["padding"] == {"intermediate_size": [OWN, PADDED]}
    assert json.loads((more / "config.json").read_text())["intermediate_size"] == PADDED
    for name, matrix in decoded(more).items():
        if "mlp" in name:
            rest = matrix[:, OWN:] if "down" in name else matrix[OWN:]
            assert rest.numel()
            assert not rest.any(), name
    export(more, tmp_path / "again", format="quern")
    first, again = stored_tensors(own), stored_tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "padding" not in json.loads((tmp_path / "again" / "quern.json").read_text())


@pytest.mark.parametrize("choices", OTHER.values(), ids=list(OTHER))
def test_rows_of_zeros_stay_zeros_whatever_else_is_done(choices, model, text, tmp_path):
    more = made(model, tmp_path / "more", text, padding=PADDING, **choices)
    rows = [matrix[OWN:] for name, matrix in decoded(more).items() if "up_proj" in name]
    assert len(rows) == 2
    assert not any(zeros.any() for zeros in rows)
    assert load(more).logits(IDS).isfinite().all()


@pytest.mark.parametrize("format", ["quern", "compressed-tensors", "gptq", "awq", "onnx"])
def test_formats_store_the_padded_model_and_say_what_it_was(format, model, text, tmp_path):
    out = made(model, tmp_path / "out", text, padding=PADDING, format=format, **SAME["integer"])
    assert json.loads((out / "quern.json").read_text())["padding"] == {"intermediate_size": [OWN, PADDED]}
    if format == "onnx":
        return
    found = inspect(out)
    assert found.parameters == inspect(model).parameters
    assert {row.shape for row in found.tensors if "up_proj.weight" in row.name} == {(OWN, 64)}
    assert found.notes[-1].startswith(f"intermediate_size {OWN} is stored as {PADDED}")
    if format in ("gptq", "awq"):
        opened = open_original(out)
        assert opened.config["intermediate_size"] == OWN
        again = made(out, tmp_path / "again", text, weights=WEIGHTS, rounding={"method": "stored"})
        own = decoded(made(model, tmp_path / "own", text, **SAME["integer"]))
        kept = decoded(again)
        half = {name: weight.half().float() for name, weight in own.items()}
        assert all(torch.equal(kept[name].half().float(), half[name]) for name in kept if "mlp" in name)


def test_a_file_for_llama_cpp_gets_k_quants_that_the_model_itself_does_not_fit(text, tmp_path):
    config = tiny_config("qwen2", hidden_size=256, intermediate_size=384, num_hidden_layers=1, head_dim=64)
    model = write_model(tmp_path / "model", config)
    q4_k = {"weights": {"codec": "ggml", "type": "q4_k"}, "format": "gguf", "rounding": GPTQ}
    plain = quantize(model, tmp_path / "plain.gguf", recipe=small_recipe(**q4_k), calibration=[text], threads=1)
    whole = quantize(
        model, tmp_path / "whole.gguf", recipe=small_recipe(**q4_k, padding={"intermediate": 256}), calibration=[text]
    )  # fmt: skip
    assert any("rows of 384 weights are stored as" in note for note in plain.notes)
    assert not any("are stored as" in note for note in whole.notes)
    kinds = {row.name: (row.codec, row.shape) for row in inspect(whole.path).tensors}
    assert kinds["model.layers.0.mlp.down_proj.weight"] == ("q4_k", (256, 384))
    assert open_model(whole.path).config["intermediate_size"] == 512
    opened = open_original(whole.path)
    assert opened.config["intermediate_size"] == 384
    assert opened.read("model.layers.0.mlp.up_proj.weight").shape == (384, 256)


def test_export_keeps_the_zeros_where_that_is_asked_for_or_codes_do_not_part(artifact, model, text, tmp_path):
    with pytest.raises(UserError, match=r"packs outputs by 32, and there are 80.*--keep-padding|keep_padding=True"):
        export(artifact, tmp_path / "gptq", format="gptq")
    export(artifact, tmp_path / "gptq", format="gptq", keep_padding=True)
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["intermediate_size"] == PADDED
    rotated = made(model, tmp_path / "rotated", text, padding=PADDING, **OTHER["rotated"])
    with pytest.raises(
        UserError, match=r"down_proj was padded with zeros, and its codes .* do not fit its own shape 64 x 80"
    ):
        export(rotated, tmp_path / "out", format="quern")


def test_training_begins_with_a_padded_artifact(artifact, model, tmp_path):
    report = train(model, tmp_path / "out", artifact=artifact, tokens=256, passes=1, threads=1)
    assert json.loads((report.path / "quern.json").read_text())["padding"] == {"intermediate_size": [OWN, PADDED]}
    up = decoded(report.path)["model.layers.0.mlp.up_proj"]
    assert up.shape == (PADDED, 64)
    assert not up[OWN:].any()


def test_what_cannot_be_padded_is_refused_before_any_work(model, text, tmp_path):
    points = {"weights": {"codec": "ggml", "type": "iq4_nl"}, "padding": PADDING}
    with pytest.raises(UserError, match="codec ggml as the recipe has it does not store zeros exactly"):
        made(model, tmp_path / "out", text, **points)
    with pytest.raises(UserError, match=r"padding\.intermediate: .*greater than or equal to 2"):
        small_recipe(padding={"intermediate": 1})
    with pytest.raises(UserError, match="unknown key; known keys here: intermediate"):
        small_recipe(padding={"rows": 32})
    assert not list(tmp_path.iterdir())
    fits = made(model, tmp_path / "fits", text, padding={"intermediate": 16}, **SAME["integer"])
    assert "padding" not in json.loads((fits / "quern.json").read_text())


@pytest.mark.parametrize(("record", "problem"), [
    ({"intermediate_size": [OWN, 128]}, "was padded to 128; config.json says 96"),
    ({"intermediate_size": [0, PADDED]}, "0 was padded to 96"),
    ({"intermediate_size": [True, PADDED]}, "must be two numbers"),
    (["intermediate_size"], "must be two numbers"),
    ({"intermediate_size": [32, PADDED]}, "has other numbers than zeros in the rows"),
])  # fmt: skip
def test_a_record_that_lies_is_refused(record, problem, model, tmp_path):
    larger = padded(open_original(model), Padding(**PADDING))
    write_safetensors(tmp_path / "model.safetensors", {n: larger.read(n) for n in larger.names()}, METADATA)
    (tmp_path / "config.json").write_text(json.dumps(larger.config), "utf-8")
    (tmp_path / "quern.json").write_text(json.dumps({"padding": record}), "utf-8")
    with pytest.raises(BadFileError, match=problem):
        unpadded(open_model(tmp_path)).read("model.layers.0.mlp.up_proj.weight")
