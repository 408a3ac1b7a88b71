"""``tuning`` of recipes, from a checkpoint to an artifact: not a byte more, nearer to the model, the same bytes whatever happens."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from artifacts import INT8, hashes, small_recipe
from first_blocks import write_first_blocks
from tiny_model import ROUTED, calibration_text, tiny_config, write_model

import quern
from quern.architectures.base import ARCHITECTURES
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.codecs.kmeans import KMeansCodec
from quern.core.errors import UserError
from quern.engines.reference import load
from quern.loading.fitting import open_model
from quern.quantization.training.reconstruction import Reconstruction

IDS = torch.randint(0, 296, (4, 48), generator=torch.Generator().manual_seed(4))
FISHER = {"token_weight": "fisher", "tokens": 768}
GPTQ = {"weights": {"bits": 2, "group_size": 32}, "embedding": INT8, "rounding": {"method": "gptq"}}
RECIPES = {
    "grid": {**GPTQ, "calibration": {**FISHER, "tokens": 1536}, "tuning": {"passes": 1}},
    "trellis": {
        **GPTQ,
        "weights": {"codec": "trellis", "bits": 2},
        "transforms": [{"method": "hadamard"}],
        "tuning": {"passes": 2, "between": 0, "learning_rate": 3e-4},
    },
    "tables": {**GPTQ, "weights": {"codec": "kmeans", "bits": 2}, "tuning": {"train": "scales", "between": 0}},
    "coarse scales": {
        **GPTQ,
        "weights": {"codec": "mxfp4"},
        "tuning": {"passes": 1, "between": 0, "learning_rate": 1e-4},
    },
    "static inputs": {
        **GPTQ,
        "weights": {"bits": 4, "group_size": 32},
        "activations": {"mode": "static"},
        "tuning": {"passes": 1, "between": 0, "learning_rate": 1e-4},
    },
    "not weighted": {
        "weights": {"bits": 2, "group_size": 32},
        "calibration": {"token_weight": "none", "tokens": 768},
        "tuning": {"passes": 1, "between": 0, "learning_rate": 3e-4},
    },
}
CHILD = """
import json, os, signal, sys
import quern
from quern.core.recipe import parse_recipe
from quern.quantization.training.reconstruction import Reconstruction
asked = json.loads(sys.argv[1])
step, made = Reconstruction._step, []
def counted(self, done):
    made.append(done)
    if len(made) == asked["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, done)
Reconstruction._step = counted
quern.quantize(asked["model"], asked["output"], recipe=parse_recipe(asked["recipe"], "asked"), calibration=[asked["text"]])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    write_model(folder / "model", tiny_config(num_hidden_layers=2, initializer_range=0.1))
    (folder / "text.txt").write_text(calibration_text()[:20_000], "utf-8")
    return folder


def recipe_of(choices):
    return small_recipe(**{"calibration": FISHER, **choices})


def quantize(place, name, choices, **given):
    return quern.quantize(
        place / "model", place / name, recipe=recipe_of(choices), calibration=[place / "text.txt"], **given
    )


def tensor_bytes(folder):
    checkpoint = open_model(folder)
    return {name: (checkpoint.info(name).shape, checkpoint.info(name).dtype) for name in checkpoint.names()}


@pytest.mark.parametrize("name", RECIPES)
def test_it_adds_no_byte_and_is_told_of(name, place):
    plain = {key: value for key, value in RECIPES[name].items() if key != "tuning"}
    tuned, rounded = quantize(place, f"{name} tuned", RECIPES[name]), quantize(place, f"{name} rounded", plain)
    assert tensor_bytes(tuned.path) == tensor_bytes(rounded.path)
    assert rounded.tuning == []
    assert [block.block for block in tuned.tuning] == [0, 1]
    assert all(0 <= block.after <= block.before for block in tuned.tuning)
    assert any(block.after < block.before for block in tuned.tuning)
    provenance = json.loads((tuned.path / "quern.json").read_text())
    assert provenance["tuning"] == [block.model_dump() for block in tuned.tuning]
    assert "tuning" not in json.loads((rounded.path / "quern.json").read_text())
    assert "tuning" not in recipe_of(plain).to_json()
    again = quantize(place, f"{name} tuned", RECIPES[name])
    assert again.seconds is None
    assert again.tuning == tuned.tuning


@pytest.mark.parametrize("family", [*sorted(set(ARCHITECTURES.names()) - set(ROUTED)), "qwen2_moe"])
def test_every_family_and_any_number_of_threads(family, tiny_text, tmp_path):
    """With scalings, rotation and both other streams; 8 bits: the logits are those of the model but for a few percent."""
    dtype = "bfloat16" if len(family) % 2 else "float32"
    config = tiny_config(family, torch_dtype=dtype, tie_word_embeddings=False, initializer_range=0.1)
    if family in ROUTED:  # a dense block, then a routed one whose experts all tokens meet, so that no choice changes
        config |= {"num_hidden_layers": 2, "decoder_sparse_step": 2, "num_experts_per_tok": 4}
    model = write_model(tmp_path / "model", config)
    recipe = small_recipe(
        weights={"bits": 8, "group_size": 40, "scale_dtype": "float32"},
        embedding=INT8,
        head=INT8,
        rounding={"method": "gptq", "target": "drift", "two_sided": True},
        transforms=[{"method": "smoothquant"}, {"method": "awq"}, {"method": "hadamard"}],
        tuning={"passes": 1},
    )
    for threads in (1, 3):
        quern.quantize(model, tmp_path / str(threads), recipe=recipe, calibration=[tiny_text], threads=threads)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    exact, ours = load(model, dtype="float32").logits(IDS), load(tmp_path / "1", dtype="float32").logits(IDS)
    assert float((ours - exact).norm()) < 0.05 * float(exact.norm())


def test_it_lowers_the_divergence_of_trained_weights(tmp_path):
    """The bundled model's first blocks at two bits, on another text than that of calibration."""
    model = write_first_blocks(tmp_path / "model", 2)
    ids = usable_tokenizer(model, True)(calibration_text()[:12_000])["input_ids"][: 4 * 256]
    exact = load(model, dtype="float32").logits(torch.tensor(ids).view(4, 256)).log_softmax(-1)
    found = {}
    for name, choices in {"rounded": {}, "tuned": {"tuning": {}}}.items():
        recipe = small_recipe(**{**GPTQ, **choices}, calibration={**FISHER, "tokens": 4096, "sequence_length": 128})
        report = quern.quantize(model, tmp_path / name, recipe=recipe, threads=2, cache=tmp_path / "cache")
        ours = load(report.path, dtype="float32").logits(torch.tensor(ids).view(4, 256)).log_softmax(-1)
        found[name] = float((exact.exp() * (exact - ours)).sum(-1).mean())
    assert found["tuned"] < 0.97 * found["rounded"]
    assert all(block.after < 0.95 * block.before for block in report.tuning)


@pytest.fixture(scope="module")
def undisturbed(place):
    """Hashes of an artifact that was made in one go, and how many steps that took."""
    steps, step = [], Reconstruction._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reconstruction, "_step", lambda self, done: steps.append(done) or step(self, done))
        report = quantize(place, "whole", RECIPES["grid"], threads=1)
    return hashes(report.path), len(steps)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_killed_run_ends_with_the_same_bytes(share, place, undisturbed):
    """Killed at the first step, on the way through the first block, and near the end of the second."""
    expected, steps = undisturbed
    output = place / f"killed at {share}"
    asked = {
        "model": str(place / "model"),
        "output": str(output),
        "text": str(place / "text.txt"),
        "recipe": recipe_of(RECIPES["grid"]).to_json(),
        "kill": 1 + int(share * (steps - 1)),
    }
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(asked)], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    report = quantize(place, output.name, RECIPES["grid"], threads=3)
    assert report.resumed
    assert hashes(output) == expected


def test_steps_that_lead_away_change_nothing_and_are_noted(place):
    wild = {**GPTQ, "tuning": {"learning_rate": 0.9}}
    report, rounded = quantize(place, "wild", wild), quantize(place, "tame", GPTQ)
    shards = [path.name for path in report.path.glob("*.safetensors")]
    assert {name: hashes(report.path)[name] for name in shards} == {n: hashes(rounded.path)[n] for n in shards}
    assert all(block.after == block.before and block.best_step == 0 for block in report.tuning)
    assert any("tuning of block 0 stopped: after step" in note for note in report.notes)
    assert any(
        "smaller learning_rate" in note for note in json.loads((report.path / "quern.json").read_text())["notes"]
    )


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({"passes": 0}, "tuning.passes"),
        ({"learning_rate": 1.5}, "tuning.learning_rate"),
        ({"train": "weights"}, "tuning.train"),
        ({"method": "adaround"}, "tuning.method"),
        ({"rate": 0.1}, "tuning.rate: unknown key; known keys here: method, train, passes, between, learning_rate"),
    ],
)
def test_keys_that_make_no_sense_are_refused(tuning, said):
    with pytest.raises(UserError, match=said):
        small_recipe(**GPTQ, tuning=tuning)


def test_a_recipe_that_quantizes_no_linear_has_nothing_to_tune():
    small_recipe(weights={"codec": "none"}, overrides=[{"pattern": "*.v_proj", "bits": 8}], tuning={})
    with pytest.raises(UserError, match="tuning trains quantized linears, and no scheme here quantizes one"):
        small_recipe(weights={"codec": "none"}, tuning={})


def test_what_cannot_be_tuned_is_refused_before_any_work(place, tmp_path, monkeypatch):
    one_sequence = {**GPTQ, "calibration": {"tokens": 64}, "tuning": {}}
    with pytest.raises(
        UserError, match="holds out one of 8 calibration sequences, at least one, and there is but one of 64"
    ):
        quern.quantize(place / "model", tmp_path / "out", recipe=small_recipe(**one_sequence))
    kept = {**GPTQ, "rounding": {"method": "stored"}, "weights": {"bits": 8}, "tuning": {}}
    with pytest.raises(UserError, match=r"tuning changes values, and rounding of model\.layers\.0\..* keeps them"):
        quern.quantize(place / "model", tmp_path / "out", recipe=small_recipe(**kept))
    monkeypatch.setattr(KMeansCodec, "trains_codes", False)
    tables = {**GPTQ, "weights": {"codec": "kmeans", "bits": 2}, "tuning": {}}
    with pytest.raises(
        UserError, match=r"cannot train codes of codec kmeans; those of .*integer.* it can.*train: scales"
    ):
        quern.quantize(place / "model", tmp_path / "out", recipe=small_recipe(**tables))
    assert not list(tmp_path.iterdir())


def test_what_is_outside_of_the_blocks_may_be_what_tuning_cannot_train(place, tmp_path, monkeypatch):
    monkeypatch.setattr(KMeansCodec, "trains_codes", False)
    recipe = recipe_of({**GPTQ, "embedding": {"codec": "kmeans", "bits": 4}, "tuning": {"passes": 1, "between": 0}})
    assert quern.quantize(place / "model", tmp_path / "out", recipe=recipe, calibration=[place / "text.txt"]).tuning


def test_planned_recipes_are_tuned_within_their_bytes(place, tmp_path):
    """Losses are those of rounding, so that one table serves both; the tuned artifact fits the bytes that were planned."""
    candidates = [{"bits": 2, "group_size": 32}, {"bits": 4, "group_size": 32}]
    choices = {"allocation": {"candidates": candidates, "target": {"bits": 7.0}}, "rounding": {"method": "gptq"}}
    given = {"calibration": [place / "text.txt"], "cache": tmp_path / "cache"}
    for name, tuning in (("rounded", {}), ("tuned", {"tuning": {"passes": 1}})):
        recipe = recipe_of({**choices, **tuning})
        report = quern.quantize(place / "model", tmp_path / name, recipe=recipe, **given)
        planned = quern.plan(place / "model", recipe=recipe, **given)
        assert report.bytes <= planned.bytes
        assert (report.recipe.tuning is not None) == bool(tuning)
        assert bool(report.tuning) == bool(tuning)
    assert len(list((tmp_path / "cache").glob("losses-*"))) == 1


def test_rows_of_results_have_it(place):
    report = quantize(place, "grid tuned", RECIPES["grid"])
    row = quern.evaluate(report.path, tokens=256, speed_rounds=0, texts=[place / "text.txt"])
    assert row.tuning == report.tuning
