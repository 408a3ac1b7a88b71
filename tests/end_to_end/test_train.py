"""``quern train``: the same bytes, nearer to the model; resumed after kills with the same bytes; and what is refused."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from artifacts import INT8, hashes, small_recipe
from tiny_model import calibration_text, tiny_config, write_model

import quern
from quern.codecs.kmeans import KMeansCodec
from quern.core.errors import BadFileError, OutOfMemoryCapError, UserError
from quern.engines.reference import load
from quern.loading.fitting import open_model

GROUPED = {"weights": {"bits": 2, "group_size": 32}, "embedding": INT8}
TRELLIS = {
    "weights": {"codec": "trellis", "bits": 2},
    "embedding": INT8,
    "transforms": [{"method": "hadamard"}],
}
TABLES = {"weights": {"codec": "kmeans", "bits": 2}, "embedding": INT8, "activations": {}}
RECIPES = {"grid": GROUPED, "trellis": TRELLIS, "tables": TABLES}
TOKENS = 3072
CHILD = """
import os, signal, sys
import quern
from quern.core.recipe import parse_recipe
from quern.pipeline.training import state
import json
asked = json.loads(sys.argv[1])
state.STATE_SECONDS = 0.0
kept = state.StateFiles.keep
def keep(self, history, best, tensors):
    kept(self, history, best, tensors)
    if history.step == asked["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
state.StateFiles.keep = keep
quern.train(asked["model"], asked["output"], recipe=parse_recipe(asked["recipe"], "asked"), texts=[asked["text"]],
            tokens=asked["tokens"], threads=asked["threads"])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_model(folder / "model", tiny_config(num_hidden_layers=2))
    (folder / "text.txt").write_text(calibration_text()[:20_000], "utf-8")
    return folder


def train(place, name, recipe=None, **choices):
    given = {"recipe": recipe, "texts": [place / "text.txt"], "tokens": TOKENS, "passes": 2, "learning_rate": 2e-3}
    return quern.train(place / "model", place / name, **{**given, **choices})


def divergence(place, artifact):
    """Mean KL divergence on the training text, by the reference engine."""
    from quern.checkpoint.tokenizer import usable_tokenizer

    ids = usable_tokenizer(place / "model", True)((place / "text.txt").read_text("utf-8"))["input_ids"][: 128 * 16]
    import torch

    batch = torch.tensor(ids).view(-1, 128)
    teacher, student = (
        load(path, dtype="float32").logits(batch).log_softmax(-1) for path in (place / "model", artifact)
    )
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def tensor_bytes(folder):
    checkpoint = open_model(folder)
    return {name: (checkpoint.info(name).shape, checkpoint.info(name).dtype) for name in checkpoint.names()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bytes_are_nearer_to_the_model(name, place):
    recipe = small_recipe(**RECIPES[name])
    quern.quantize(place / "model", place / f"{name}-start", recipe=recipe, calibration=[place / "text.txt"])
    before = divergence(place, place / f"{name}-start")
    for kind in ("scales", "codes"):
        report = train(place, f"{name}-{kind}", artifact=place / f"{name}-start", train=kind)
        assert tensor_bytes(report.path) == tensor_bytes(place / f"{name}-start")
        assert report.kl_after < report.kl_before
        assert divergence(place, report.path) < before
        provenance = json.loads((report.path / "quern.json").read_text())
        assert provenance["training"]["kl_after"] == report.kl_after
        assert provenance["training"]["tokens"] == report.tokens == TOKENS
        assert any("trained" in note for note in provenance["notes"])
        assert not (place / f"{name}-{kind}.quern-work").exists()
        again = train(place, f"{name}-{kind}", artifact=place / f"{name}-start", train=kind)
        assert again.seconds is None
        assert again.kl_after == report.kl_after


def test_the_divergence_that_is_told_is_what_engines_have(place):
    """Of the whole text when the held-out part is all that is looked at: one sequence of two."""
    recipe = small_recipe(**GROUPED)
    report = train(place, "told", recipe, train="scales", tokens=256, passes=1)
    from quern.architectures.base import architecture_of
    from quern.checkpoint.tokenizer import usable_tokenizer
    from quern.loading.fitting import open_original
    from quern.pipeline.training.text import TrainingText

    text = TrainingText([place / "text.txt"], usable_tokenizer(place / "model", True), 256)
    sequences, heldout = text.drawn(architecture_of(open_original(place / "model").config), 0)
    assert heldout == 1
    models = [load(place / folder, dtype="float32") for folder in ("model", "told")]
    teacher, student = (model.logits(sequences[-1:]).log_softmax(-1)[0] for model in models)
    assert float((teacher.exp() * (teacher - student)).sum(-1).mean()) == pytest.approx(report.kl_after, rel=1e-3)


def child(forking, place, output, threads, kill):
    asked = {
        "model": str(place / "model"), "output": str(place / output), "text": str(place / "text.txt"), "tokens": TOKENS,
        "recipe": small_recipe(**GROUPED).to_json(), "threads": threads, "kill": kill,
    }  # fmt: skip
    return forking.ended(place, "-c", CHILD, json.dumps(asked)).returncode


def test_a_killed_training_continues_with_the_same_bytes_at_any_number_of_threads(forking, place):
    """Killed after a step, and once before the first."""
    train(place, "whole", small_recipe(**GROUPED), passes=1, learning_rate=None)
    for threads, kill in ((1, 0), (2, 3)):
        assert child(forking, place, "killed", threads, kill) == -signal.SIGKILL
        assert not (place / "killed").exists()
    report = train(place, "killed", small_recipe(**GROUPED), passes=1, learning_rate=None, threads=3)
    assert report.resumed
    assert hashes(place / "killed") == hashes(place / "whole")


def test_other_formats_are_written_too(place):
    pytest.importorskip("compressed_tensors")
    recipe = small_recipe(weights={"bits": 4, "group_size": 32}, format="compressed-tensors")
    report = train(place, "vllm", recipe, train="scales")
    assert report.recipe.format == "compressed-tensors"
    assert json.loads((report.path / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "compressed-tensors"
    )
    assert np.isfinite(divergence(place, report.path))


def test_what_did_not_help_is_not_written(place):
    recipe = small_recipe(weights={"bits": 8, "granularity": "channel"})
    quern.quantize(place / "model", place / "kept-start", recipe=recipe, calibration=[place / "text.txt"])
    report = train(place, "kept", artifact=place / "kept-start", learning_rate=0.99)
    assert report.best_step == 0
    assert report.kl_after == report.kl_before
    assert any("nothing was changed" in note for note in report.notes)
    shards = [path.name for path in report.path.glob("*.safetensors")]
    assert {n: hashes(report.path)[n] for n in shards} == {n: hashes(place / "kept-start")[n] for n in shards}


@pytest.mark.parametrize("kind", ["scales", "codes"])
def test_large_models_are_trained_in_bfloat16(place, kind, monkeypatch):
    monkeypatch.setattr("quern.pipeline.train.LARGE", 1)
    report = train(place, f"narrow-{kind}", small_recipe(**GROUPED), train=kind)
    assert report.kl_after < report.kl_before


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({}, "give one of recipe and artifact"),
        ({"recipe": "rtn4", "train": "weights"}, "there are scales, codes"),
        ({"recipe": "rtn4", "learning_rate": 0.0}, "between 0 and 1"),
        ({"recipe": "rtn4", "learning_rate": float("nan")}, "between 0 and 1"),
        ({"recipe": "rtn4", "passes": 0}, "whole number from 1 on"),
        ({"recipe": "rtn4", "tokens": 10**6}, "Give more text with texts, or a smaller tokens"),
        ({"recipe": "rtn4", "tokens": 1}, "one more has to be held out"),
    ],
)
def test_requests_that_make_no_sense_are_refused(choices, said, place, tmp_path):
    with pytest.raises(UserError, match=said):
        quern.train(place / "model", tmp_path / "out", **{"texts": [place / "text.txt"], "tokens": TOKENS, **choices})
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_file_is_refused_without_an_option_that_is_not_there(place, tmp_path):
    with pytest.raises(UserError, match="and what is written is a folder. Choose another output") as refused:
        quern.train(place / "model", tmp_path / "out.gguf", recipe="rtn4", texts=[place / "text.txt"], tokens=512)
    assert "--format" not in refused.value.on_command_line


def test_text_too_short_for_the_recipe_is_refused_in_this_commands_words_and_nothing_is_left(place, tmp_path):
    recipe = small_recipe(**GROUPED, rounding={"method": "gptq"}, calibration={"tokens": 65536, "sequence_length": 64})
    with pytest.raises(
        UserError, match=r"recipe calibrates on 1024 sequences of 64 = 65536 tokens of the text"
    ) as refused:
        quern.train(place / "model", tmp_path / "out", recipe=recipe, texts=[place / "text.txt"], tokens=512)
    assert "--text" in refused.value.on_command_line
    assert "--calibration" not in refused.value.on_command_line
    assert not list(tmp_path.iterdir()), "or other choices would be told that this job is unfinished"


def test_a_cap_that_is_too_small_is_refused_with_the_least_that_does_and_another_way(place, tmp_path):
    given = {"recipe": small_recipe(**GROUPED), "texts": [place / "text.txt"], "tokens": TOKENS}
    with pytest.raises(OutOfMemoryCapError, match=r"Give at least memory=.*train=scales") as caught:
        quern.train(place / "model", tmp_path / "out", memory=10_000_000, **given)
    assert caught.value.least_bytes > 10_000_000
    assert not list(tmp_path.iterdir())


def test_another_models_artifact_and_what_is_no_artifact_are_refused(place, tmp_path):
    other = write_model(tmp_path / "other", tiny_config(num_hidden_layers=2), seed=1)
    quern.quantize(other, tmp_path / "strange", recipe=small_recipe(**GROUPED))
    for artifact, said in (
        (tmp_path / "strange", "was not made from"),
        (place / "model", "no artifact that training"),
        (place / "none", "artifact: .*none is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            train(place, str(Path(tmp_path) / "out"), artifact=artifact)


def test_the_artifact_that_training_begins_with_is_not_replaced(place, tmp_path):
    """A publication that is killed would leave nothing to begin with again."""
    start = tmp_path / "start"
    quern.quantize(place / "model", start, recipe=small_recipe(**GROUPED))
    before = hashes(start)
    (tmp_path / "link").symlink_to(start)
    with pytest.raises(UserError, match="is the artifact that training begins with. Choose another output"):
        quern.train(
            place / "model", tmp_path / "link", artifact=start, texts=[place / "text.txt"], tokens=512, fresh=True
        )
    assert hashes(start) == before


@pytest.mark.parametrize("damage", ['{"fingerprint": 1, "layers": [], "notes": []}', "[]", '{"fingerprint": {}}'])
def test_damaged_provenance_is_named(place, tmp_path, damage):
    quern.quantize(place / "model", tmp_path / "start", recipe=small_recipe(**GROUPED))
    (tmp_path / "start" / "quern.json").write_text(damage, "utf-8")
    with pytest.raises(BadFileError, match=r"quern\.json"):
        train(place, str(tmp_path / "out"), artifact=tmp_path / "start")


def test_codes_that_cannot_be_trained_and_recipes_without_any_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(KMeansCodec, "trains_codes", False)
    with pytest.raises(UserError, match=r"codes of codec kmeans cannot be trained; those of .*integer.*train=scales"):
        train(place, str(tmp_path / "out"), small_recipe(**TABLES))
    with pytest.raises(UserError, match="nothing to train"):
        train(place, str(tmp_path / "out"), small_recipe(weights={"codec": "none"}))
    assert not list(tmp_path.iterdir())
