"""Quantizing and preparing to score with texts of other forms, and with tokenizers that do not fit."""

import gzip
import json
import shutil

import pytest
from artifacts import hashes, small_recipe
from tokenizers import Tokenizer

from quern.checkpoint.checkpoint import open_checkpoint
from quern.comparison.inputs import MeasurementSettings, prepare_inputs
from quern.core.errors import BadFileError, UserError
from quern.pipeline.quantize import quantize
from quern.texts.source import Text

GPTQ = {"weights": {"bits": 4, "symmetric": False, "group_size": 32}, "rounding": {"method": "gptq"}}
NEAREST = {"weights": {"bits": 4, "group_size": 32}}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def paragraphs(tiny_text):
    return [part for part in tiny_text.read_text("utf-8").split("\n\n") if part.strip()]


def test_records_calibrate_as_the_same_texts_in_memory_do_and_that_is_said(tiny_model, paragraphs, tmp_path):
    packed = gzip.compress("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in paragraphs).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    (tmp_path / "list.json").write_text(json.dumps(paragraphs))
    made = {}
    for name, source in {
        "jsonl": tmp_path / "a.jsonl.gz",
        "json": tmp_path / "list.json",
        "memory": Text.of("mine", paragraphs),
    }.items():
        report = quantize(tiny_model, tmp_path / name, recipe=small_recipe(**GPTQ), calibration=[source], threads=1)
        made[name] = hashes(report.path)
        if name == "jsonl":
            assert f"a.jsonl.gz: JSON, field text, {len(paragraphs)} records" in report.notes
    assert made["jsonl"] == made["json"] == made["memory"]


def test_records_are_scored_by_the_same_rules(tiny_model, paragraphs, tmp_path):
    checkpoint, settings = open_checkpoint(tiny_model), MeasurementSettings(tokens=200, window=64, decode_tokens=8)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    records = prepare_inputs(checkpoint, tmp_path / "one", texts=[tmp_path / "a.jsonl"], settings=settings)
    memory = prepare_inputs(checkpoint, tmp_path / "two", texts=[Text.of("t", paragraphs)], settings=settings)
    assert records.windows_sha256 == memory.windows_sha256
    assert len(records.taken) == 1
    assert records.taken[0].startswith("a.jsonl: JSON, field text, the first")
    assert memory.taken == ()


def test_more_tokens_may_be_asked_for_than_the_recipe_has(tiny_model, tiny_text, tmp_path):
    made = {}
    for name, (in_recipe, tokens) in {"recipe": (1024, None), "argument": (512, 1024)}.items():
        recipe = small_recipe(**GPTQ, calibration={"tokens": in_recipe, "sequence_length": 64})
        given = {"recipe": recipe, "calibration": [tiny_text], "threads": 1}
        made[name] = quantize(tiny_model, tmp_path / name, calibration_tokens=tokens, **given)
    assert hashes(made["recipe"].path) == hashes(made["argument"].path)
    assert made["argument"].recipe.calibration.tokens == 1024
    nearest = quantize(
        tiny_model, tmp_path / "nearest", recipe=small_recipe(**NEAREST), calibration_tokens=5, threads=1
    )
    assert nearest.recipe.calibration.tokens != 5, "what reads no text is the same with any"
    for wrong in (0, 2.5, True):
        with pytest.raises(UserError, match=f"calibration_tokens is {wrong}; it must be a whole number from 1 on"):
            quantize(tiny_model, tmp_path / "out", recipe=small_recipe(**GPTQ), calibration_tokens=wrong)


def test_conversations_go_through_the_models_template(tiny_model, paragraphs, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    records = [{"messages": [{"role": "user", "content": text}]} for text in paragraphs]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(BadFileError, match="no chat template"):
        quantize(model, tmp_path / "out", recipe=small_recipe(**GPTQ), calibration=[tmp_path / "chat.jsonl"])
    assert not (tmp_path / "out").exists()
    (model / "chat_template.jinja").write_text(TEMPLATE)
    settings = MeasurementSettings(tokens=200, window=64, decode_tokens=8)
    found = prepare_inputs(open_checkpoint(model), tmp_path / "one", texts=[tmp_path / "chat.jsonl"], settings=settings)
    written = Text.of("t", [f"user: {text}\n" for text in paragraphs])
    same = prepare_inputs(open_checkpoint(model), tmp_path / "two", texts=[written], settings=settings)
    assert found.windows_sha256 == same.windows_sha256
    assert "field messages through the chat template" in found.taken[0]


@pytest.mark.parametrize("recipe", [NEAREST, GPTQ], ids=["nearest", "gptq"])
def test_a_tokenizer_is_tried_before_anything_is_quantized(tiny_model, tiny_text, tmp_path, recipe):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Magic"}}')
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        quantize(model, tmp_path / "out", recipe=small_recipe(**recipe), calibration=[tiny_text], threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("recipe", [NEAREST, GPTQ], ids=["nearest", "gptq"])
def test_added_tokens_beyond_the_embedding_do_not_matter_until_they_occur(tiny_model, tiny_text, tmp_path, recipe):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<extra {number}>" for number in range(9)])
    tokenizer.save(str(model / "tokenizer.json"))
    job = {"recipe": small_recipe(**recipe), "threads": 1}
    quantize(model, tmp_path / "out", calibration=[tiny_text], **job)
    (tmp_path / "extra.txt").write_text("<extra 8>" + tiny_text.read_text("utf-8").replace(" ", " <extra 8>"), "utf-8")
    if recipe is GPTQ:
        with pytest.raises(UserError, match=r"has token \d+ \('<extra 8>'\), and the embedding has 300 rows"):
            quantize(model, tmp_path / "bad", calibration=[tmp_path / "extra.txt"], **job)
    settings = MeasurementSettings(tokens=200, window=64, decode_tokens=8)
    with pytest.raises(UserError, match="'<extra 8>'"):
        prepare_inputs(open_checkpoint(tmp_path / "out"), tmp_path, texts=[tmp_path / "extra.txt"], settings=settings)
