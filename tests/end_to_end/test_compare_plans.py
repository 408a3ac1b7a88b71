"""A comparison with an allocation: planned for its target, measured, found again, and reported as what was decided."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from artifacts import stored_schemes
from tiny_model import calibration_text, tiny_config, write_model

from quern.core.errors import UserError
from quern.core.recipe import load_recipe
from quern.core.results import Results, Row, load_results
from quern.core.scheme import parse_scheme
from quern.pipeline.compare import compare
from quern.pipeline.planning.plan import plan

BITS = 4.5
pytestmark = pytest.mark.usefixtures("quiet_machine", "warm_workers")


def write_recipe(path: Path, bits: float) -> Path:
    """The shipped ``auto`` with another target and as much calibration as a tiny model has text for."""
    recipe = load_recipe("auto").to_json()
    recipe["allocation"]["target"] = {"bits": bits}
    recipe |= {"name": "small", "calibration": {"tokens": 256, "sequence_length": 32}}
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    write_model(folder / "model", tiny_config(num_hidden_layers=2))
    (folder / "text.txt").write_text(calibration_text()[:20_000], "utf-8")
    write_recipe(folder / "small.yaml", BITS)
    return folder


def compared(place: Path, recipe: str = "small.yaml") -> Results:
    return compare(
        place / "model", place / "out", recipes=[place / recipe], calibration=[place / "text.txt"],
        texts=[place / "text.txt"], tokens=200, speed_rounds=0, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def row(place) -> Row:
    return compared(place).rows[-1]


def embedded(place: Path) -> dict[str, Any]:
    """What the page's script draws from."""
    page = (place / "out" / "report.html").read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_row_has_the_recipe_that_was_decided(place, row):
    assert row.name == "small"
    assert row.bits_per_weight <= BITS
    assert "allocation" not in row.recipe
    stored = stored_schemes(place / "out" / "artifacts" / "small")
    schemes = {
        one["pattern"]: {key: value for key, value in one.items() if key not in ("pattern", "rotated")}
        for one in row.recipe["overrides"]
    } | {"model.embed_tokens": row.recipe["embedding"]}
    assert {name: parse_scheme(one) for name, one in schemes.items()} == stored
    assert len(set(stored.values())) > 2


def test_losses_are_those_of_the_plan(place, row):
    report = plan(
        place / "model", recipe=place / "small.yaml", calibration=[place / "text.txt"], cache=place / "out" / "cache",
        threads=1,
    )  # fmt: skip
    assert {layer.linear: layer.predicted_loss for layer in row.layers} == {m.name: m.loss for m in report.matrices}
    assert load_results(place / "out" / "results.json").rows[-1].layers == row.layers


def test_the_report_shows_the_plan(place, row):
    (grid,) = embedded(place)["plans"]
    assert (grid["name"], grid["depths"]) == ("small", 2)
    assert [cell["linear"] for cell in grid["cells"]] == [layer.linear for layer in row.layers]
    assert [cell["loss"] for cell in grid["cells"]] == [layer.predicted_loss for layer in row.layers]
    assert grid["roles"][0] == "embed_tokens"
    assert len(grid["roles"]) == 1 + 7


def test_a_second_comparison_finds_it_done(place, row):
    again = compared(place).rows[-1]
    assert again.model_dump() == row.model_dump()


def test_another_target_under_the_same_name_is_another_job(place, row):
    write_recipe(place / "other.yaml", 8)
    with pytest.raises(UserError, match="holds the result of another job"):
        compared(place, "other.yaml")
