"""What an artifact remembers of its calibration, and texts whose inputs leave that."""

import io
import json

import numpy as np
import pytest
import torch
from artifacts import INT8, make_artifact
from rich.console import Console

from quern.checkpoint.checkpoint import open_checkpoint
from quern.cli.views import results as render
from quern.comparison.input_shift import calibrated_inputs, measured_shift, sentence, student_limit
from quern.core.errors import BadFileError
from quern.core.progress import Silent
from quern.core.results import Row
from quern.engines.reference import load
from quern.evaluation.texts import Window
from quern.pipeline.evaluate import evaluate
from quern.texts.source import Text

CALIBRATION = {"tokens": 2048, "sequence_length": 64}
CHOICES = {
    "static": {"weights": INT8, "activations": {"mode": "static", "observer": "percentile"}},
    "gptq, rotated": {"weights": {"bits": 4, "group_size": 32}, "rounding": {"method": "gptq"}, "transforms": [{"method": "hadamard"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(tiny_model, tiny_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shift")
    return {
        name: make_artifact(tiny_model, folder / f"{number}", tiny_text, calibration=CALIBRATION, **choices)
        for number, (name, choices) in enumerate(CHOICES.items())
    }


@pytest.mark.parametrize("name", CHOICES)
def test_an_artifact_keeps_what_its_linears_read(name, artifacts, tiny_model, tiny_text):
    """Against hooks on the finished artifact, run on the very sequences that calibrated it."""
    from quern.checkpoint.tokenizer import load_tokenizer
    from quern.core.recipe_parts import Calibration
    from quern.pipeline.blockwise.calibration_text import CalibrationText

    kept = calibrated_inputs(open_checkpoint(artifacts[name]))
    assert kept.tokens == 2048
    assert [group.linears[0].rpartition(".")[2] for group in kept.groups] == 3 * [
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    ]
    assert sum(len(group.linears) for group in kept.groups) == 3 * 7
    settings = Calibration(**CALIBRATION)
    sequences = CalibrationText([tiny_text], load_tokenizer(tiny_model), settings).sequences(128, 300, 0)
    model = load(artifacts[name], dtype="float32").model
    seen: dict[str, list[torch.Tensor]] = {}
    for group in kept.groups:
        module = model.get_submodule(group.linears[0])
        module.register_forward_pre_hook(
            lambda _, inputs, name=group.linears[0]: seen.setdefault(name, []).append(inputs[0].detach().float().abs())
        )
        if name == "static":
            assert group.clip == pytest.approx(127.5 * float(module.input_scale), rel=1e-6)
        else:
            assert (group.clip, group.clipped) == (None, None)
            module.activations = "none"
    with torch.inference_mode():
        model(sequences, use_cache=False)
    for group in kept.groups:
        sizes = torch.cat(seen[group.linears[0]]).flatten(0, -2)
        # Blocks ran on weights and inputs in float32; int8 inputs were only rounded for the model that runs here.
        loose = 0.1 if name == "static" else 1e-3
        assert group.greatest == pytest.approx(float(sizes.max()), rel=loose)
        assert abs(np.log2(group.reach / np.quantile(sizes.numpy(), 0.999))) < 1 / 8
        energies = [float(run.double().square().sum()) for run in sizes.tensor_split(16, dim=1)]
        assert np.allclose(group.profile, np.array(energies) / sum(energies), atol=loose)
        if name == "static":
            assert group.clipped == pytest.approx(float((sizes > group.clip).float().mean()), abs=5e-3)


def test_it_is_small_and_the_same_at_any_number_of_threads(artifacts, tiny_model, tiny_text, tmp_path):
    kept = json.loads((artifacts["static"] / "quern.json").read_text())["inputs"]
    assert all(len(json.dumps(group)) < 900 for group in kept["groups"])
    again = make_artifact(
        tiny_model, tmp_path / "out", tiny_text, threads=3, calibration=CALIBRATION, **CHOICES["static"]
    )
    assert (again / "quern.json").read_bytes() == (artifacts["static"] / "quern.json").read_bytes()


def test_uncalibrated_artifacts_keep_nothing(tiny_model, tiny_text, tmp_path):
    folder = make_artifact(tiny_model, tmp_path / "out", tiny_text, weights=INT8)
    assert "inputs" not in json.loads((folder / "quern.json").read_text())
    windows = [Window(0, np.arange(20))]
    assert measured_shift(open_checkpoint(folder), windows, dtype="float32", threads=None, progress=Silent()) is None


def shift_of(folder, windows):
    return measured_shift(open_checkpoint(folder), windows, dtype="float32", threads=None, progress=Silent())


@pytest.mark.parametrize("name", CHOICES)
def test_other_text_is_told_from_text_like_calibrations(name, artifacts, tiny_model, tiny_text):
    """Other sequences of the calibration text say nothing; one token again and again leaves what calibration saw."""
    from quern.checkpoint.tokenizer import load_tokenizer
    from quern.core.recipe_parts import Calibration
    from quern.pipeline.blockwise.calibration_text import CalibrationText

    settings = Calibration(**{**CALIBRATION, "tokens": 1024})
    alike = CalibrationText([tiny_text], load_tokenizer(tiny_model), settings).sequences(128, 300, 5)
    quiet = shift_of(artifacts[name], [Window(0, ids.numpy()) for ids in alike])
    assert quiet.beyond_chance == []
    assert sentence(quiet) is None
    assert 0 < quiet.groups[0].score <= quiet.limit
    same = shift_of(artifacts[name], [Window(0, np.full(64, 200)) for _ in range(16)])
    assert len(same.beyond_chance) > len(same.groups) / 2
    assert [group.score for group in same.groups] == sorted((g.score for g in same.groups), reverse=True)
    told = sentence(same)
    assert same.groups[0].linears[0] in told
    assert ("clipped" in told) == (name == "static")


@pytest.mark.parametrize(("level", "limit"), [(0.1, 1.833), (0.05, 2.262), (0.01, 3.250), (0.001, 4.781)])
def test_the_limit_is_that_of_the_printed_table(level, limit):
    assert student_limit(level) == pytest.approx(limit, abs=6e-4)


def test_a_larger_embedding_moves_the_reach_by_as_much(artifacts, tmp_path):
    """Twice the first norm's scale: the first block's inputs reach twice as far, and a static scale clips them."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(artifacts["static"], folder := tmp_path / "out")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.layers.0.input_layernorm.weight" in tensors:
            tensors["model.layers.0.input_layernorm.weight"] *= 2
            save_file(tensors, shard, metadata={"format": "pt"})
    windows = [Window(0, ids) for ids in np.random.default_rng(1).integers(0, 256, (16, 64))]
    before, after = shift_of(artifacts["static"], windows), shift_of(folder, windows)
    first = "model.layers.0.self_attn.q_proj"
    one, two = (next(g for g in shift.groups if g.linears[0] == first) for shift in (before, after))
    assert two.reach_ratio == pytest.approx(2 * one.reach_ratio, rel=1e-3)
    assert two.profile_distance == pytest.approx(one.profile_distance, abs=1e-3)
    assert two.clipped > 2 * max(one.clipped, 1e-4)


def test_evaluate_tells_it_of_a_text(artifacts, quiet_machine, warm_workers):
    """It starts a process, which takes seconds."""
    texts = [Text.of("odd", ["\x7f\x01\x02" * 400])]
    row = evaluate(artifacts["static"], texts=texts, tokens=512, window=64, speed_rounds=0)
    assert row.input_shift.tokens == 512
    assert any("are not like those of calibration" in note for note in row.notes)
    assert Row.model_validate_json(row.model_dump_json()) == row
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render.row(row))
    shown = console.export_text()
    assert row.input_shift.groups[0].linears[0] in shown
    assert "beyond calibration" in shown
    assert render.input_shift(row.model_copy(update={"input_shift": None})) == []


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0}, {"tokens": "many"}, {"more": 1}, {"groups": 5}, {"sequences": 10**6},
        {"groups": [{"linears": ["model.layers.0.mlp.zap"]}]}, {"groups": [{"linears": []}]}, {"groups": [{"profile": [1.0]}]},
        {"groups": [{"reach": "far"}]}, {"groups": [{"spread": [0.0, 1.0]}]}, {"groups": [{"clipped": 2.0}]},
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(change, artifacts, tmp_path):
    import shutil

    shutil.copytree(artifacts["static"], folder := tmp_path / "out")
    found = json.loads((folder / "quern.json").read_text())
    if isinstance(change.get("groups"), list):
        change = {"groups": [{**found["inputs"]["groups"][0], **change["groups"][0]}]}
    found["inputs"] |= change
    (folder / "quern.json").write_text(json.dumps(found))
    with pytest.raises(BadFileError, match=r"quern\.json"):
        calibrated_inputs(open_checkpoint(folder))
