"""As many calibration tokens as are worth it."""

import json
import re

import pytest
from artifacts import hashes, small_recipe
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model

from quern.core.errors import UserError
from quern.pipeline.compare import compare
from quern.pipeline.planning import text_budget
from quern.pipeline.planning.plan import plan
from quern.pipeline.quantize import quantize

GPTQ = {"weights": {"bits": 4, "symmetric": False, "group_size": 32}, "rounding": {"method": "gptq"}}


@pytest.fixture
def small(monkeypatch):
    """A first lot of four sequences, four held out, and at most 32."""
    for name, value in {"FIRST": 128, "HELD_OUT": 128, "MOST": 1024}.items():
        monkeypatch.setattr(text_budget, name, value)


def recipe_of(token_weight="fisher"):
    return small_recipe(**GPTQ, calibration={"tokens": 512, "sequence_length": 32, "token_weight": token_weight})


@pytest.mark.parametrize("token_weight", ["fisher", "norm", "none"])
def test_the_number_found_is_as_good_as_one_that_is_given(tiny_model, tiny_text, tmp_path, small, token_weight):
    given = {"recipe": recipe_of(token_weight), "calibration": [tiny_text], "threads": 1, "cache": tmp_path / "cache"}
    found = quantize(tiny_model, tmp_path / "found", calibration_tokens="auto", **given)
    tokens = found.recipe.calibration.tokens
    assert tokens in {128, 256, 512, 1024}
    (note,) = [note for note in found.notes if note.startswith("calibration takes")]
    assert note.startswith(f"calibration takes {tokens} tokens")
    course = dict(re.findall(r"(\d+) (\d\.\d{3})", note))
    assert list(course)[:2] == ["128", "256"]
    assert course["128"] == "1.000"
    stated = quantize(tiny_model, tmp_path / "stated", calibration_tokens=tokens, **given)
    assert hashes(found.path) == hashes(stated.path)


def test_an_answer_is_found_once(tiny_model, tiny_text, tmp_path, small, monkeypatch):
    given = {
        "recipe": recipe_of(),
        "calibration": [tiny_text],
        "calibration_tokens": "auto",
        "cache": tmp_path / "cache",
    }
    first = quantize(tiny_model, tmp_path / "one", threads=2, **given)
    assert [path.name for path in (tmp_path / "cache").glob("text-budget*")] == [
        path.name for path in (tmp_path / "cache").glob("text-budget-*.json")
    ], "nothing is left of the passes"

    def never(*anything):
        raise AssertionError("was found already")

    (answer,) = (tmp_path / "cache").glob("text-budget-*.json")
    whole = answer.read_bytes()
    for damaged in (b"", b"[]", b"{}", b'{"tokens": "128", "note": "n"}'):
        answer.write_bytes(damaged)
        assert quantize(tiny_model, tmp_path / "again", threads=1, fresh=True, **given).notes == first.notes
        assert answer.read_bytes() == whole
    monkeypatch.setattr(text_budget, "_settled", never)
    again = quantize(tiny_model, tmp_path / "two", threads=1, **given)
    assert hashes(first.path) == hashes(again.path)
    assert first.notes == again.notes


def test_a_killed_search_starts_over(tiny_model, tiny_text, tmp_path, small, monkeypatch):
    given = {
        "recipe": recipe_of(),
        "calibration": [tiny_text],
        "calibration_tokens": "auto",
        "cache": tmp_path / "cache",
    }
    add = text_budget._Growth.add

    def killed(self, loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_budget._Growth, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, tmp_path / "out", threads=1, **given)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(text_budget._Growth, "add", add)
    assert quantize(tiny_model, tmp_path / "out", threads=1, **given).recipe.calibration.tokens >= 128


def test_time_ends_the_search_and_the_note_says_so(tiny_model, tiny_text, tmp_path, small):
    given = {"recipe": recipe_of(), "calibration": [tiny_text], "threads": 1, "cache": tmp_path / "cache"}
    report = quantize(tiny_model, tmp_path / "out", calibration_time=1e-6, **given)
    assert report.recipe.calibration.tokens == 128
    assert any("twice as many would take more than" in note for note in report.notes)


def test_a_model_that_loses_nothing_needs_no_more_than_the_first_lot(tiny_text, tmp_path, small):
    """Logits are 0 whatever it reads, and so are all gradients."""
    config = tiny_config(num_hidden_layers=1, tie_word_embeddings=False)
    model = write_model(tmp_path / "model", config)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    given = {"recipe": recipe_of(), "calibration": [tiny_text], "threads": 1, "cache": tmp_path / "cache"}
    report = quantize(model, tmp_path / "out", calibration_tokens="auto", **given)
    assert report.recipe.calibration.tokens == 128
    assert any("128 0.000; more cannot lower it" in note for note in report.notes)


def test_plan_and_compare_find_it_too(tiny_model, tiny_text, tmp_path, small, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    candidates = [{"scheme": {"bits": bits, "group_size": 32}} for bits in (3, 4)]
    allocating = small_recipe(
        weights={"bits": 4, "group_size": 32}, rounding={"method": "gptq"}, calibration={"sequence_length": 32},
        allocation={"target": {"bits": 12}, "candidates": candidates})  # fmt: skip
    planned = plan(tiny_model, recipe=allocating, calibration=[tiny_text], calibration_tokens="auto", threads=1)
    assert planned.recipe.calibration.tokens in {128, 256, 512, 1024}
    assert any(note.startswith("calibration takes") for note in planned.notes)
    results = compare(
        tiny_model, tmp_path / "comparison", recipes=[recipe_of()], calibration=[tiny_text], calibration_tokens="auto",
        tokens=128, window=64, speed_rounds=0, threads=1)  # fmt: skip
    provenance = json.loads((tmp_path / "comparison/artifacts" / recipe_of().name / "quern.json").read_text())
    assert provenance["fingerprint"]["recipe"]["calibration"]["tokens"] in {128, 256, 512, 1024}
    assert results.failures == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"calibration_tokens": 512, "calibration_time": 60.0},
            "calibration_time is for finding out.*Give one of the two",
        ),
        ({"calibration_time": 0.0}, "calibration_time is 0.0; it must be above 0 seconds"),
        ({"calibration_time": float("nan")}, "calibration_time is nan"),
        ({"calibration_tokens": "most"}, "calibration_tokens is 'most'; it must be a whole number from 1 on, or auto"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_model, tiny_text, tmp_path, asked, said):
    with pytest.raises(UserError, match=said):
        quantize(tiny_model, tmp_path / "out", recipe=recipe_of(), calibration=[tiny_text], threads=1, **asked)
    assert not (tmp_path / "out").exists()


def test_text_must_suffice_for_holding_some_out(tiny_model, tiny_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(tiny_text.read_text("utf-8")[:4000], "utf-8")
    with pytest.raises(UserError, match=r"has \d+ tokens; to find out how many are worth it takes at least 24576"):
        quantize(tiny_model, tmp_path / "out", recipe=recipe_of(), calibration=[short], calibration_tokens="auto")


def test_a_recipe_that_reads_no_text_stays(tiny_model, tmp_path):
    nearest = small_recipe(weights={"bits": 4, "group_size": 32})
    report = quantize(tiny_model, tmp_path / "out", recipe=nearest, calibration_tokens="auto", threads=1)
    assert report.recipe == nearest
