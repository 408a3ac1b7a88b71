"""Models that other tools quantized, through every command: run as their decoded values, quantized again, shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from artifacts import INT8, hashes, small_recipe, stored_tensors
from foreign_models import VARIANTS, ForeignModel, change, gptq, plain_copy, write_foreign
from safetensors.torch import load_file
from typer.testing import CliRunner

from quern.cli.main import app
from quern.comparison.row_builder import contender_of
from quern.core.errors import UserError
from quern.engines.base import ENGINES, engine_for
from quern.loading.fitting import open_model, open_original, open_stored
from quern.pipeline.compare import compare
from quern.pipeline.evaluate import evaluate
from quern.pipeline.inspect import inspect
from quern.pipeline.quantize import quantize

IDS = torch.tensor([[1, 5, 17, 40, 95, 0, 3, 64]])
RUN = ("gptq desc_act", "awq", "fp8 blocks", "bitsandbytes nf4 nested", "bitsandbytes int8")
NAMED = {"gptq desc_act": "GPTQ", "awq": "AWQ", "compressed-tensors int4": "compressed-tensors"}
QUICK = {"tokens": 64, "speed_rounds": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ForeignModel]:
    folder = tmp_path_factory.mktemp("foreign")
    names = {*RUN, *NAMED}
    return {
        name: write_foreign(folder / name.replace(" ", "_"), VARIANTS[name], tokenizer=True) for name in sorted(names)
    }


@pytest.mark.parametrize("engine", ENGINES.names())
@pytest.mark.parametrize("name", RUN)
def test_engines_run_the_decoded_values(name, engine, models, tmp_path):
    plain = plain_copy(models[name], tmp_path / "plain")
    ours, theirs = (
        ENGINES.get(engine)().load(path, dtype="float32").logits(IDS) for path in (models[name].folder, plain)
    )
    assert torch.equal(ours, theirs)
    assert bool(ours.isfinite().all())


@pytest.mark.parametrize("name", NAMED)
def test_quantizing_again_gives_the_artifact_of_the_values_and_says_so(name, models, tmp_path):
    recipe = small_recipe(weights={"bits": 3, "group_size": 32}, embedding=INT8)
    report = quantize(models[name].folder, tmp_path / "out", recipe=recipe)
    expected = quantize(plain_copy(models[name], tmp_path / "plain"), tmp_path / "expected", recipe=recipe)
    ours, theirs = (stored_tensors(made.path) for made in (report, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[part], theirs[part]) for part in ours)
    said = f"the weights were quantized before, by {NAMED[name]} (4 bits by group 32)"
    assert report.notes[0].startswith(said)
    kept = json.loads((report.path / "quern.json").read_text("utf-8"))["notes"]
    assert kept[0] == report.notes[0]
    assert not any("quantized before" in note for note in expected.notes)

    source = open_original(models[name].folder)
    stored = sum(path.stat().st_size for path in source.files)
    sizes = [note for note in report.notes if note.startswith("the source takes")]
    assert len(sizes) == 1
    assert "Compression is measured against the weights in bf16" in sizes[0]
    assert source.parameters == sum(math.prod(value.shape) for value in models[name].values.values()) + sum(
        source.info(n).elements for n in source.names() if n not in models[name].values
    )
    assert source.bf16_bytes > stored
    assert report.compression == 1 - report.bytes / source.bf16_bytes

    again = quantize(models[name].folder, tmp_path / "out", recipe=recipe)
    assert [note for note in again.notes if "finished already" not in note] == report.notes
    assert said in contender_of(open_model(report.path)).notes[0]


def test_calibrated_rounding_and_the_other_format_take_it_too(models, tiny_text, tmp_path):
    recipe = small_recipe(
        weights={"bits": 4, "group_size": 32}, rounding={"method": "gptq"}, format="compressed-tensors"
    )
    report = quantize(models["awq"].folder, tmp_path / "out", recipe=recipe, calibration=[tiny_text])
    assert "by AWQ" in report.notes[0]
    with pytest.raises(UserError, match="already quantized, by compressed-tensors"):
        quantize(report.path, tmp_path / "again", recipe=small_recipe())  # quern's own is not


@pytest.mark.usefixtures("warm_workers")
def test_evaluating_says_that_model_and_reference_are_quantized(models):
    row = evaluate(models["awq"].folder, reference=models["gptq desc_act"].folder, **QUICK)
    assert row.kind == "unquantized"
    assert row.kl_mean is not None
    assert row.kl_mean > 0
    starts = ("the reference: the weights were quantized before, by GPTQ", "the weights were quantized before, by AWQ")
    assert all(any(note.startswith(start) for note in row.notes) for start in starts)


@pytest.mark.usefixtures("warm_workers")
def test_comparing_starts_from_the_decoded_values(models, tmp_path):
    """Of those that transformers runs: the reference is run by it, and what is quantized are the values."""
    name = "compressed-tensors int4"
    results = compare(models[name].folder, tmp_path / "out", recipes=[small_recipe()], **QUICK)
    source = open_original(models[name].folder)
    assert (results.model.parameters, results.model.bf16_bytes) == (source.parameters, source.bf16_bytes)
    first = results.rows[0]
    assert first.name == "unquantized"
    assert any("quantized before, by" in note for note in first.notes)
    assert first.compression > 0.3
    made = next(row for row in results.rows if row.kind == "quern")
    assert any("quantized before, by" in note for note in made.notes)
    with pytest.raises(UserError, match="peers: other tools start from unquantized checkpoints"):
        compare(models[name].folder, tmp_path / "peers", recipes=[small_recipe()], peers=["hqq"], **QUICK)


def test_compressed_tensors_models_run_as_before(models, tmp_path):
    """By transformers, from the codes, which in float32 gives the same values."""
    name = "compressed-tensors int4"
    checkpoint = open_model(models[name].folder)
    assert checkpoint == open_stored(models[name].folder)
    assert contender_of(checkpoint).kind == "quern"
    assert engine_for(checkpoint) == "reference"
    ours = ENGINES.get("reference")().load(models[name].folder, dtype="float32").logits(IDS)
    plain = plain_copy(models[name], tmp_path / "plain")
    assert torch.equal(ours, ENGINES.get("reference")().load(plain, dtype="float32").logits(IDS))


def test_inspect_shows_method_bits_and_groups(models):
    for name in RUN:
        variant, found = VARIANTS[name], inspect(models[name].folder)
        rows = {row.name: row for row in found.tensors}
        assert set(rows) == set(open_original(models[name].folder).names())
        for weight, value in models[name].values.items():
            row = rows[weight]
            method = variant.config["quant_method"]
            assert (row.shape, row.codec, row.granularity, row.bits) == (
                tuple(value.shape), method, variant.granularity, variant.bits
            )  # fmt: skip
        stored = load_file(models[name].folder / "model.safetensors").values()
        assert sum(row.bytes for row in found.tensors) == sum(value.nbytes for value in stored)
        assert found.bits_per_weight == 8 * sum(row.bytes for row in found.tensors) / found.parameters
        assert "quantized before, by" in found.notes[0]
        assert len(found.notes) == len(open_original(models[name].folder).notes)


def test_inspect_shows_what_cannot_be_decoded_with_the_reason(models, tmp_path):
    found = inspect(change(models["awq"], tmp_path / "model", version="gemv"))
    assert found.notes == (next(note for note in found.notes if "version 'gemv' of AWQ is not read" in note),)
    assert {row.codec for row in found.tensors} == {"awq", "bf16"}


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quip", "exl2", "exl3", None])
def test_other_methods_stay_refused_with_those_that_are_read(method, models, tmp_path):
    folder = change(models["awq"], tmp_path / "model", quant_method=method)
    read = "awq, bitsandbytes, compressed-tensors, fp8, gptq, mxfp4"
    for use in (lambda: quantize(folder, tmp_path / "out"), lambda: ENGINES.get("reference")().load(folder)):
        with pytest.raises(UserError) as caught:
            use()
        assert read in str(caught.value)
        assert str(method) in str(caught.value)
    assert read in inspect(folder).notes[0]


def test_the_command_line_takes_them_and_refuses_contradictions(models, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(small_recipe().to_json()))
    words = ["quantize", str(models["awq"].folder), "--recipe", str(recipe), "--json", "-o", str(tmp_path / "out")]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert "by AWQ (4 bits by group 32)" in json.loads(ended.stdout)["notes"][0]
    bad = change(models["awq"], tmp_path / "bad", group_size=16)
    ended = CliRunner().invoke(app, [*words[:1], str(bad), *words[2:-1], str(tmp_path / "other")])
    assert ended.exit_code == 2
    assert "_proj.qzeros' must be" in ended.output or "_proj.scales' must be" in ended.output
    shown = CliRunner().invoke(app, ["inspect", str(models["awq"].folder), "--json"])
    assert shown.exit_code == 0
    assert {row["codec"] for row in json.loads(shown.stdout)["tensors"]} == {"awq", "bf16"}


def with_both_ends(model: ForeignModel, folder: Path, bits: int) -> Path:
    """Every group of every row has the lowest and the highest code, as min-max grids have."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("qweight")]:
            words = tensors[name]
            per_group = 32 * bits // 32
            words[::per_group] = (words[::per_group] & ~0xFF) | 0xF0

    return change(model, folder, edit)


def test_the_same_asymmetric_grid_again_loses_nothing(tmp_path):
    """A group's least and greatest values are (0 - z) s and (15 - z) s: their difference / 15 is s, exactly."""
    model = with_both_ends(write_foreign(tmp_path / "model", gptq(4, 32), "llama"), tmp_path / "ends", 4)
    source = open_original(model)
    for observer in ("min_max", "mean_squared_error"):
        grid = {"bits": 4, "symmetric": False, "group_size": 32, "observer": observer, "scale_dtype": "float16"}
        report = quantize(model, tmp_path / observer, recipe=small_recipe(weights=grid))
        assert len(report.layers) == 2 * 7
        assert [layer.relative_error for layer in report.layers] == [0.0] * 14
        again = ENGINES.get("reference")().load(report.path, dtype="float32").logits(IDS)
        assert torch.equal(again, ENGINES.get("reference")().load(source.path, dtype="float32").logits(IDS))


def test_the_same_symmetric_grid_again_is_another_one(tmp_path):
    """Its scale is 2/15 of the greatest value, which was 8 or 7 scales and not 7.5."""
    model = with_both_ends(write_foreign(tmp_path / "model", gptq(4, 32, sym=True), "llama"), tmp_path / "ends", 4)
    grid = {"bits": 4, "symmetric": True, "group_size": 32, "observer": "min_max", "scale_dtype": "float16"}
    report = quantize(model, tmp_path / "out", recipe=small_recipe(weights=grid))
    assert min(layer.relative_error for layer in report.layers) > 0


def test_sources_are_read_only(models, tmp_path):
    before = hashes(models["awq"].folder)
    quantize(models["awq"].folder, tmp_path / "out", recipe=small_recipe())
    assert hashes(models["awq"].folder) == before
