"""GGUF files: by quantizing and by exporting, read back as what the artifact computes; whole or not there."""

import errno
import json
from pathlib import Path

import gguf
import pytest
import torch
from artifacts import INT8, make_artifact, small_recipe
from gguf_model import write_gguf
from tiny_model import tiny_config, write_model
from typer.testing import CliRunner

import quern
from quern.checkpoint.gguf.header import read_gguf_header
from quern.checkpoint.gguf.writing import container
from quern.checkpoint.tokenizer import load_tokenizer
from quern.cli.main import app
from quern.core.errors import UserError
from quern.core.recipe import load_recipe
from quern.engines.base import ENGINES
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

IDS = torch.randint(0, 296, (2, 21), generator=torch.Generator().manual_seed(3))
MIXED = {
    "weights": {"bits": 4, "group_size": 32},
    "overrides": [
        {"pattern": "*.o_proj", "codec": "none"},
        {"pattern": "*.1.mlp.*", "bits": 5, "group_size": 32},
        {"pattern": "*.down_proj", "codec": "mxfp4"},
    ],
    "embedding": {"bits": 8, "granularity": "channel"},
    "head": {"bits": 6, "group_size": 64},
}
FAMILIES = {
    "llama": tiny_config("llama", tie_word_embeddings=False),
    "mistral": tiny_config("mistral", num_attention_heads=2, head_dim=32, num_key_value_heads=1),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3", attention_bias=False, tie_word_embeddings=False),
}


def logits(path: Path) -> torch.Tensor:
    return ENGINES.get("reference")().load(path, dtype="float32").logits(IDS)


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_computes_what_the_folder_computes(family, tiny_text, tmp_path):
    """The same codes, in ggml's blocks and llama.cpp's order of rows: not a bit of a logit differs."""
    model = write_model(tmp_path / "model", FAMILIES[family])
    folder = make_artifact(model, tmp_path / "folder", tiny_text, **MIXED)
    file = make_artifact(model, tmp_path / "model.gguf", tiny_text, format="gguf", **MIXED)
    assert torch.equal(logits(file), logits(folder))
    report = export(folder, tmp_path / "exported.gguf")
    assert tensors(tmp_path / "exported.gguf") == tensors(file)
    assert report.bytes == (tmp_path / "exported.gguf").stat().st_size
    kinds = {name: kind for name, (kind, _) in tensors(file).items()}
    assert {kinds[f"blk.1.{name}.weight"] for name in ("ffn_gate", "ffn_up")} == {"Q5_0"}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_output.weight"]) == ("Q4_0", "MXFP4", "BF16")  # fmt: skip
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"]) == ("Q8_0", "F32")
    assert kinds.get("output.weight") == (None if FAMILIES[family]["tie_word_embeddings"] else "Q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported.gguf", "folder", "model", "model.gguf"]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_an_unquantized_model_keeps_its_dtype(dtype, kind, tmp_path):
    model = write_model(tmp_path / "model", tiny_config("llama", torch_dtype=dtype))
    export(model, tmp_path / "model.gguf")
    assert torch.equal(logits(tmp_path / "model.gguf"), logits(model))
    found = tensors(tmp_path / "model.gguf")
    assert found["blk.0.ffn_up.weight"][0] == kind
    assert found["blk.0.ffn_norm.weight"][0] == "F32"
    text = "def f(x):\n    return x  # 12345"
    assert load_tokenizer(tmp_path / "model.gguf").encode(text) == load_tokenizer(model).encode(text)


def test_the_metadata_say_what_was_done(tiny_model, tiny_text, tmp_path):
    folder = make_artifact(tiny_model, tmp_path / "folder", tiny_text, weights={"bits": 4, "group_size": 32})
    report = export(folder, tmp_path / "model.gguf")
    said = read_gguf_header(tmp_path / "model.gguf").metadata
    assert said["general.quantized_by"] == f"quern {quern.__version__}"
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    provenance, before = json.loads(said["quern.provenance"]), json.loads((folder / "quern.json").read_text("utf-8"))
    assert provenance["layers"] == before["layers"]
    assert provenance["fingerprint"]["recipe"] == json.loads(said["quern.recipe"])
    assert all(note in report.notes for note in provenance["notes"])


def test_it_is_finished_already_or_replaced_on_demand(tiny_model, tmp_path):
    output, recipe = tmp_path / "model.gguf", small_recipe(weights={"bits": 4, "group_size": 32})
    assert quantize(tiny_model, output, recipe=recipe, format="gguf", threads=1).seconds is not None
    before = output.read_bytes()
    again = quantize(tiny_model, output, recipe=recipe, format="gguf", threads=1)
    assert (again.seconds, output.read_bytes()) == (None, before)
    assert "was finished already" in again.notes
    other = small_recipe(weights={"bits": 8, "group_size": 32})
    with pytest.raises(UserError, match="holds the result of another job"):
        quantize(tiny_model, output, recipe=other, format="gguf", threads=1)
    with pytest.raises(UserError, match="format_options"):
        quantize(tiny_model, output, recipe=recipe, format="gguf", format_options={"pre-tokenizer": "qwen2"}, threads=1)
    assert output.read_bytes() == before
    quantize(tiny_model, output, recipe=other, format="gguf", fresh=True, threads=1)
    assert tensors(output)["blk.0.ffn_up.weight"][0] == "Q8_0"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_disk_that_is_full_midway_leaves_nothing_that_looks_finished(tiny_model, tmp_path, monkeypatch):
    output, recipe = tmp_path / "model.gguf", small_recipe(weights={"bits": 4, "group_size": 32})
    pad, written = container._pad, []

    def full(file):
        written.append(file)
        if len(written) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pad(file)

    with monkeypatch.context() as patch:
        patch.setattr(container, "_pad", full)
        with pytest.raises(UserError, match="not enough room"):
            quantize(tiny_model, output, recipe=recipe, format="gguf", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.quern-work"]
    report = quantize(tiny_model, output, recipe=recipe, format="gguf", threads=1)
    assert report.resumed
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    whole = tmp_path / "whole.gguf"
    quantize(tiny_model, whole, recipe=recipe, format="gguf", threads=1)
    assert tensors(whole) == tensors(output)


def test_a_gguf_as_the_source_keeps_its_tokenizer(tmp_path):
    model = write_model(tmp_path / "model", tiny_config("llama", tie_word_embeddings=False))
    (source,) = write_gguf(model, tmp_path / "source.gguf", kind=gguf.GGMLQuantizationType.Q4_0)
    recipe = small_recipe(weights={"bits": 4, "group_size": 32}, rounding={"method": "stored"})
    quantize(source, tmp_path / "out.gguf", recipe=recipe, format="gguf", threads=1)
    old, new = tensors(source), tensors(tmp_path / "out.gguf")
    assert {n for n, (kind, _) in new.items() if kind == "Q4_0"} == {n for n, (k, _) in old.items() if k == "Q4_0"} - {"token_embd.weight", "output.weight"}  # fmt: skip
    assert torch.equal(logits(tmp_path / "out.gguf"), logits(source))
    assert load_tokenizer(tmp_path / "out.gguf").encode("a b") == load_tokenizer(source).encode("a b")
    with pytest.raises(UserError, match="is the model itself"):
        quantize(source, source, recipe=recipe, format="gguf", threads=1)


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"weights": {"codec": "nf4"}}, "no type of ggml has the values of codec nf4"),
        ({"weights": {"group_size": 32}, "transforms": [{"method": "hadamard"}]}, "leave transform hadamard out"),
        ({"weights": {"bits": 8, "symmetric": False, "group_size": 32}}, "8 bits with zero points"),
        ({"weights": {"group_size": 32}, "storage": "entropy"}, "not entropy-coded"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_any_work(choices, why, tiny_model, tmp_path):
    with pytest.raises(UserError, match=why):
        quantize(tiny_model, tmp_path / "x.gguf", recipe=small_recipe(**choices), format="gguf", threads=1)
    assert not list(tmp_path.iterdir())


def test_names_and_formats_go_together(tiny_model, tmp_path):
    recipe = small_recipe(weights={"group_size": 32})
    with pytest.raises(UserError, match=r"format gguf writes one file, whose name ends in \.gguf"):
        quantize(tiny_model, tmp_path / "folder", recipe=recipe, format="gguf")
    with pytest.raises(UserError, match="is the name of a file of format gguf, and format quern writes a folder"):
        quantize(tiny_model, tmp_path / "x.gguf", recipe=recipe)
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="was not written by quern"):
        quantize(tiny_model, tmp_path / "mine.gguf", recipe=recipe, format="gguf", fresh=True)
    with pytest.raises(UserError, match="format gguf has no option 'zap'; it has: pre-tokenizer"):
        quantize(tiny_model, tmp_path / "x.gguf", recipe=recipe, format="gguf", format_options={"zap": "x"})
    with pytest.raises(UserError, match="format quern has no options"):
        quantize(tiny_model, tmp_path / "x", recipe=recipe, format_options={"zap": "x"})
    with pytest.raises(UserError, match="training makes folders, and format gguf"):
        quern.train(tiny_model, tmp_path / "x", recipe=recipe.model_copy(update={"format": "gguf"}))
    with pytest.raises(UserError, match="a comparison makes folders, and format gguf"):
        quern.compare(tiny_model, tmp_path / "x", recipes=[recipe.model_copy(update={"format": "gguf"})])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.gguf"]


def test_types_are_allocated_by_what_they_lose(tiny_text, tmp_path):
    """Within the bits that were asked for, and not the same for all."""
    model = write_model(tmp_path / "model", tiny_config("llama", hidden_size=256, intermediate_size=256, head_dim=64))
    recipe = load_recipe("auto-gguf")
    calibration = recipe.calibration.model_copy(update={"tokens": 256, "sequence_length": 64, "token_weight": "none"})
    candidates = [c for c in recipe.allocation.candidates if c.scheme.params.type in ("q2_k", "q4_k", "q6_k")]
    allocation = recipe.allocation.model_copy(update={"candidates": tuple(candidates)})
    recipe = recipe.model_copy(update={"calibration": calibration, "allocation": allocation})
    report = quantize(
        model,
        tmp_path / "x.gguf",
        recipe=recipe,
        format="gguf",
        calibration=[tiny_text],
        cache=tmp_path / "cache",
        threads=1,
    )
    assert report.recipe.format == "gguf"
    assert report.bits_per_weight < 5.2  # norms and biases are float32 in the file, and the model is small
    kinds = {kind for name, (kind, _) in tensors(tmp_path / "x.gguf").items() if ".ffn_" in name or ".attn_" in name}
    assert len(kinds & {"Q2_K", "Q4_K", "Q6_K"}) >= 2


def test_activations_are_left_to_llama_cpp_with_a_note(tiny_model, tiny_text, tmp_path):
    folder = make_artifact(tiny_model, tmp_path / "folder", tiny_text, weights=INT8, activations={"mode": "static"})
    report = export(folder, tmp_path / "model.gguf")
    assert any("quantizes activations in its own way" in note for note in report.notes)
    assert tensors(tmp_path / "model.gguf")["blk.0.ffn_up.weight"][0] == "Q8_0"


def test_other_formats_are_exported_too(tiny_model, tiny_text, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    choices = {"weights": {"bits": 4, "group_size": 32}}
    folder = make_artifact(tiny_model, tmp_path / "folder", tiny_text, **choices)
    export(folder, tmp_path / "exported", format="compressed-tensors")
    assert torch.equal(logits(tmp_path / "exported"), logits(folder))
    with pytest.raises(UserError, match="is in the format compressed-tensors; export begins with"):
        export(tmp_path / "exported", tmp_path / "x.gguf")


def test_on_the_command_line(tiny_model, tmp_path):
    ended = CliRunner().invoke(
        app, ["export", str(tiny_model), "-o", str(tmp_path / "x.gguf"), "--format-option", "pre-tokenizer=qwen2"]
    )
    assert ended.exit_code == 0, ended.stderr
    assert read_gguf_header(tmp_path / "x.gguf").metadata["tokenizer.ggml.pre"] == "qwen2"
    for wrong in (["pre-tokenizer"], ["=x"], ["pre-tokenizer=a", "--format-option", "pre-tokenizer=b"]):
        ended = CliRunner().invoke(
            app, ["export", str(tiny_model), "-o", str(tmp_path / "y.gguf"), "--format-option", *wrong]
        )
        assert ended.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
