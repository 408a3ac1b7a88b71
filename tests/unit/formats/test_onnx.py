"""The ONNX writer without ONNX Runtime: bytes of the container, refusals, notes, and how a folder comes to be."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import INT8, hashes, make_artifact, small_recipe
from tiny_model import tiny_config, write_model

from quern.architectures.base import architecture_of
from quern.core.errors import UserError
from quern.formats import onnx as onnx_format
from quern.formats.onnx import DATA, FILE, OnnxWriter
from quern.formats.onnx_files import wire
from quern.formats.onnx_files.graph import ALIGNMENT, Graph
from quern.pipeline.blockwise.job import plan_of
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
PACKED = {"weights": {"bits": 4, "group_size": 32}, "embedding": {"bits": 8, "granularity": "channel"}}


def fields(raw: bytes) -> list[tuple[int, Any]]:
    """The fields of a protocol buffer, read as its specification says."""
    found, place = [], 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = raw[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    while place < len(raw):
        key = varint()
        if key & 7 == 0:
            found.append((key >> 3, varint()))
        elif key & 7 == 5:
            found.append((key >> 3, struct.unpack("<f", raw[place : place + 4])[0]))
            place += 4
        else:
            assert key & 7 == 2
            size = varint()
            found.append((key >> 3, raw[place : place + size]))
            place += size
            assert place <= len(raw)
    return found


def every(message: bytes, field: int) -> list[Any]:
    return [value for number, value in fields(message) if number == field]


def tensors(folder: Path) -> dict[str, bytes]:
    """By name what lies in the file of tensors, each where the graph says, and nothing else but gaps of zeros."""
    (graph,) = every((folder / FILE).read_bytes(), 7)
    data, found, end = (folder / DATA).read_bytes(), {}, 0
    for tensor in every(graph, 5):
        if place := {every(pair, 1)[0]: every(pair, 2)[0] for pair in every(tensor, 13)}:
            assert place[b"location"] == DATA.encode()
            offset, length = int(place[b"offset"]), int(place[b"length"])
            assert offset % ALIGNMENT == 0
            assert 0 <= offset - end < ALIGNMENT
            assert not any(data[end:offset])
            end = offset + length
            found[every(tensor, 8)[0].decode()] = data[offset:end]
    assert end == len(data)
    return found


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (-1, "ff" * 9 + "01")]
)
def test_varints_by_the_examples_of_the_specification(value, expected):
    assert wire.varint(value).hex() == expected


def test_fields_by_hand():
    assert wire.number(1, 150).hex() == "089601"
    assert wire.data(2, "testing").hex() == "120774657374696e67"
    assert wire.real(2, 1.0).hex() == "150000803f"
    assert fields(wire.pairs(13, {"a": "b"})) == [(13, bytes.fromhex("0a0161120162"))]


def test_a_node_that_repeats_another_is_not_made():
    graph = Graph(io.BytesIO(), "x")
    first = graph.node("Add", ["a", "b"], "m")
    assert graph.node("Add", ["a", "b"], "n") == first == "m/Add"
    assert graph.node("Add", ["a", "b"], "n", axis=1) == "n/Add"
    assert graph.integers([3]) == graph.integers([3]) != graph.constant(torch.tensor([3.0]))
    with pytest.raises(AssertionError):
        graph.node("Add", ["a", "c"], "m")


def test_stored_tensors_lie_as_they_are(tiny_text, tmp_path):
    """Codes of whole blocks as quern has them, scales in their dtype, what is not quantized byte for byte."""
    from artifacts import stored_tensors

    model = write_model(tmp_path / "model", tiny_config("qwen2", tie_word_embeddings=False))
    choices = {"overrides": [{"pattern": "*.o_proj", "codec": "none"}], "head": {"bits": 4, "group_size": 64}}
    own = make_artifact(model, tmp_path / "own", tiny_text, **PACKED, **choices)
    export(own, tmp_path / "onnx", format="onnx")
    found, stored = tensors(tmp_path / "onnx"), stored_tensors(own)

    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(torch.uint8).numpy().tobytes()

    assert len(found) == len([n for n in stored if not n.endswith("zero_point")])
    for name, tensor in stored.items():
        if name.endswith("embed_tokens.codes"):
            assert found[name] == raw((tensor.to(torch.int16) + 128).to(torch.uint8))
        elif tensor.dim() == 1 and tensor.dtype == torch.bfloat16:
            assert found[name] == raw(tensor.float())
        else:
            assert found[name] == raw(tensor), name


def test_linears_that_share_inputs_rotate_them_once(tiny_model, tmp_path):
    """q, k and v; gate and up: four rotations a block for seven linears, of which each is two products. The head is one more."""
    recipe = small_recipe(transforms=[{"method": "hadamard"}], **PACKED)
    quantize(tiny_model, tmp_path / "out", recipe=recipe, format="onnx", threads=1)
    (graph,) = every((tmp_path / "out" / FILE).read_bytes(), 7)
    operators = [every(node, 4)[0].decode() for node in every(graph, 1)]
    assert (operators.count("MatMulNBits"), operators.count("MatMul")) == (3 * 7 + 1, 3 * 4 * 2)
    assert sum(name.endswith("input_signs") for name in tensors(tmp_path / "out")) == 3 * 4


def test_quantizing_and_exporting_give_the_same_folder(tiny_model, tiny_text, tmp_path):
    """But for the provenance, which says what was asked; and at any number of threads."""
    own = make_artifact(tiny_model, tmp_path / "own", tiny_text, **PACKED)
    export(own, tmp_path / "exported", format="onnx")
    for threads in (1, 2):
        make_artifact(tiny_model, tmp_path / f"{threads}", tiny_text, format="onnx", threads=threads, **PACKED)
    found = [hashes(tmp_path / name) for name in ("exported", "1", "2")]
    assert {"config.json", "genai_config.json", FILE, DATA, "quern.json", "tokenizer.json"} <= set(found[0])
    assert found[1] == found[2]
    assert {name for name in found[0] if found[0][name] != found[1].get(name)} == {"quern.json"}
    assert "quantization_config" not in json.loads((tmp_path / "1" / "config.json").read_text())


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_bytes(tiny_model, tmp_path):
    recipe, output = small_recipe(**PACKED), tmp_path / "out"

    def full(*_: Any) -> None:
        raise UserError("not enough room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_format, "write_bytes", full)
        with pytest.raises(UserError, match="not enough room"):
            quantize(tiny_model, output, recipe=recipe, format="onnx", threads=1)
    assert not output.exists()
    assert quantize(tiny_model, output, recipe=recipe, format="onnx", threads=1).resumed
    quantize(tiny_model, tmp_path / "whole", recipe=recipe, format="onnx", threads=1)
    assert hashes(output) == hashes(tmp_path / "whole")
    assert quantize(tiny_model, output, recipe=recipe, format="onnx", threads=1).seconds is None
    with pytest.raises(UserError, match="holds the result of another job"):
        quantize(tiny_model, output, recipe=recipe, format="onnx", format_options={"accuracy-level": "1"}, threads=1)
    quantize(
        tiny_model, output, recipe=recipe, format="onnx", format_options={"accuracy-level": "1"}, fresh=True, threads=1
    )
    assert hashes(output)[DATA] == hashes(tmp_path / "whole")[DATA]
    assert hashes(output)[FILE] != hashes(tmp_path / "whole")[FILE]


def test_a_folder_that_exists_is_kept_and_filled(tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    number = (tmp_path / "out").stat().st_ino
    export(tiny_model, tmp_path / "out", format="onnx")
    assert (tmp_path / "out").stat().st_ino == number
    assert (tmp_path / "out" / DATA).is_file()


def test_reports_count_the_bytes_of_the_tensors(tiny_model, tmp_path):
    report = export(tiny_model, tmp_path / "out", format="onnx")
    parameters = sum(len(raw) // (4 if name.endswith((".bias", "norm.weight")) else 2)
                     for name, raw in tensors(report.path).items())  # fmt: skip
    assert report.bits_per_weight == 8 * (report.path / DATA).stat().st_size / parameters
    assert report.bytes == sum(path.stat().st_size for path in report.path.iterdir())


def test_inputs_and_outputs_are_named_as_others_name_them(tiny_model, tmp_path):
    (graph,) = every((export(tiny_model, tmp_path / "out", format="onnx").path / FILE).read_bytes(), 7)
    names = [[every(value, 1)[0].decode() for value in every(graph, field)] for field in (11, 12)]
    past = [f"{number}.{kind}" for number in range(3) for kind in ("key", "value")]
    assert names[0] == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in past)]
    assert names[1] == ["logits", *(f"present.{name}" for name in past)]


def test_genai_is_told_how_the_model_is_run(tmp_path):
    model = write_model(tmp_path / "model", tiny_config("qwen3", bos_token_id=7, max_position_embeddings=8192))
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [256, 9], "top_k": 20, "do_sample": True})
    )
    export(model, tmp_path / "out", format="onnx")
    said = json.loads((tmp_path / "out" / "genai_config.json").read_text("utf-8"))
    assert said["search"] == {"do_sample": True, "max_length": 4096, "top_k": 20, "past_present_share_buffer": True}
    assert (said["model"]["eos_token_id"], said["model"]["pad_token_id"]) == ([256, 9], 256)
    assert (said["model"]["bos_token_id"], said["model"]["type"], said["model"]["context_length"]) == (7, "qwen3", 8192)
    decoder = said["model"]["decoder"]
    assert (decoder["filename"], decoder["head_size"], decoder["num_key_value_heads"]) == (FILE, 16, 2)


def refusal(config: dict[str, Any] | None = None, **choices: Any) -> str:
    architecture = architecture_of(config or tiny_config("llama", tie_word_embeddings=False))
    recipe = small_recipe(format="onnx", **choices)
    with pytest.raises(UserError) as refused:
        OnnxWriter(recipe, plan_of(recipe, architecture), architecture).check()
    return str(refused.value)


def test_all_reasons_are_given_at_once_before_any_work():
    text = refusal(
        tiny_config("qwen2", tie_word_embeddings=False, hidden_act="gelu", rope_parameters=ROPE),
        weights={"codec": "trellis", "bits": 2},
        overrides=[{"pattern": "*.q_proj", "bits": 4, "group_size": 40}],
        embedding={"codec": "nf4"},
    )
    assert "format onnx cannot store recipe 'test'" in text
    assert "silu between gate and up, and the model has gelu" in text
    assert "another one beyond 32 tokens" in text
    assert (
        "no operator for the values of codec trellis; use codec integer (model.layers.0.self_attn.k_proj and 17 more)"
        in text
    )
    assert "groups of 40 are not made; use a multiple of 16 (model.layers.0.self_attn.q_proj and 2 more)" in text
    assert "codec nf4; use codec integer (model.embed_tokens)" in text


def test_int8_activations_have_one_scale_a_token():
    dynamic = {"mode": "dynamic"}
    assert "one scale a row or matrix in it; use granularity channel" in refusal(
        weights={"bits": 4, "group_size": 32}, activations=dynamic
    )
    assert "one scale a token or matrix, none by group" in refusal(
        weights=INT8, activations={**dynamic, "granularity": "group", "group_size": 32}
    )
    assert "entropy-coded" in refusal(weights=INT8, storage="entropy")
    assert "136 weights are no multiple of 16" in refusal(
        tiny_config("llama", hidden_size=136), weights=INT8, embedding={"bits": 4, "granularity": "channel"}
    )


def test_options_and_notes(tiny_model, tmp_path):
    recipe = small_recipe(weights={"bits": 3, "group_size": 32})
    for option, match in (
        ({"zap": "x"}, "format onnx has no option 'zap'; it has: accuracy-level"),
        ({"accuracy-level": "2"}, r"accuracy-level is '2'; known: 1 \(float32 inputs\), 4 \(int8 inputs\)"),
    ):
        with pytest.raises(UserError, match=match):
            quantize(tiny_model, tmp_path / "x", recipe=recipe, format="onnx", format_options=option)
    notes = quantize(tiny_model, tmp_path / "a", recipe=recipe, format="onnx", threads=1).notes
    assert "codes of 3 bits take 4 in ONNX Runtime's operators, with the same values (21 matrices)" in notes
    assert any("accuracy-level=1 keeps them in float32" in note for note in notes)
    exact = {"accuracy-level": "1"}
    notes = quantize(tiny_model, tmp_path / "b", recipe=recipe, format="onnx", format_options=exact, threads=1).notes
    assert not any("accuracy-level" in note for note in notes)


def test_plans_are_made_for_other_formats(tiny_model, tmp_path):
    """By whose bytes; what came of one can be exported."""
    four, eight = {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}
    recipe = small_recipe(allocation={"candidates": [four, eight], "target": {"bits": 7.0}})
    with pytest.raises(UserError, match="an allocation needs a format whose size is known beforehand"):
        quantize(tiny_model, tmp_path / "c", recipe=recipe, format="onnx")
