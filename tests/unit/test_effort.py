"""Recipes with an effort behind their name."""

import json

import pytest
import yaml

from quern.core.effort import EFFORTS
from quern.core.errors import UserError
from quern.core.recipe import load_recipe


def test_medium_turns_on_what_goes_on_from_error_feedback_and_changes_no_scheme():
    plain, medium = load_recipe("compact"), load_recipe("compact@medium")
    rounding = medium.rounding
    assert (rounding.target, rounding.sweeps, rounding.two_sided) == ("drift", 1, True)
    assert medium.head_rounding.method == "gptq"
    assert medium.tuning is None
    assert medium.name == "compact-medium"
    changed = {"name", "rounding", "head_rounding"}
    assert medium.model_dump(exclude=changed) == plain.model_dump(exclude=changed)


def test_high_tunes_blocks_besides():
    medium, high = load_recipe("compact@medium"), load_recipe("compact@high")
    assert high.tuning is not None
    assert high.model_dump(exclude={"name", "tuning"}) == medium.model_dump(exclude={"name", "tuning"})


def test_what_a_recipe_says_itself_stays(tmp_path):
    own = {
        "name": "mine", "embedding": {"bits": 4, "group_size": 32, "granularity": "group"}, "tuning": {"passes": 5},
        "rounding": {"method": "gptq", "sweeps": 3, "damping": 0.02}, "head_rounding": {"method": "nearest"},
        "overrides": [{"pattern": "*.down_proj", "bits": 8, "rounding": {"method": "nearest"}},
                      {"pattern": "*.up_proj", "rounding": {"damping": 0.1}}],
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(own), "utf-8")
    raised = load_recipe(f"{path}@high")
    assert (raised.rounding.sweeps, raised.rounding.damping, raised.rounding.target) == (3, 0.02, "drift")
    assert (raised.tuning.passes, raised.head_rounding.method) == (5, "nearest")
    first, second = (override.rounding for override in raised.overrides)
    assert (first.method, first.target) == ("nearest", "own")
    assert (second.damping, second.target, second.two_sided) == (0.1, "drift", True)


def test_a_head_that_is_not_quantized_or_whose_tokens_have_no_weights_is_left_alone(tmp_path):
    path = tmp_path / "plain.json"
    for more in ({"weights": {"bits": 4}}, {"calibration": {"token_weight": "none"}, "head": {"bits": 4}}):
        path.write_text(json.dumps({"name": "plain", **more}), "utf-8")
        raised = load_recipe(f"{path}@medium")
        assert raised.head_rounding.method == "nearest"
        assert raised.rounding.target == "drift"


def test_a_file_whose_name_has_the_mark_is_that_file(tmp_path):
    path = tmp_path / "mine@high"
    path.write_text("name: mine\n", "utf-8")
    assert load_recipe(path).name == "mine"
    assert load_recipe(f"{path}@medium").name == "mine-medium"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("compact@hgh", r"unknown effort 'hgh'.*compact@medium.*did you mean 'high'"),
        ("compact@", "unknown effort ''"),
        ("nosuch@high", "no recipe 'nosuch'"),
        ("fast@high", "'fast' rounds by nearest.*leave @high out"),
    ],
)
def test_what_cannot_be_raised_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        load_recipe(text)


@pytest.mark.parametrize(
    "content",
    [
        "rounding: 3",
        "overrides: 7",
        "overrides: [7]",
        "calibration: []",
        "head: x",
        "tuning: 3",
    ],
)
@pytest.mark.parametrize("effort", EFFORTS)
def test_a_damaged_recipe_is_refused_as_without_an_effort(tmp_path, content, effort):
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: bad\n{content}\n", "utf-8")
    with pytest.raises(UserError) as plain:
        load_recipe(path)
    with pytest.raises(UserError) as raised:
        load_recipe(f"{path}@{effort}")
    assert str(raised.value) == str(plain.value)
