"""docs/results.md names every field of results.json, and states what the code does."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from sample_results import SCENARIOS

from quern.advisor.placement import SMALL
from quern.advisor.scoring import SAME_SIZE, SCALING_EXPONENT, SMALL_LOSS, WEIGHTS
from quern.core import results
from quern.core.errors import UserError
from quern.core.metrics import RESAMPLES
from quern.core.text.units import ABOVE_LIMIT
from quern.evaluation.measures.base import all_measures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results.md").read_text("utf-8")
MODELS = [
    item
    for item in vars(results).values()
    if isinstance(item, type) and issubclass(item, BaseModel) and item.model_fields
]


def test_all_models_are_covered():
    assert {
        "Results",
        "Row",
        "Tool",
        "Failure",
        "Protocol",
        "Model",
        "TextSource",
        "Spread",
        "Figure",
        "LayerError",
        "TunedBlock",
        "GroupShift",
        "InputShift",
        "Recommendation",
        "MeasuredOn",
        "Ranked",
        "Excluded",
        "Stacking",
        "StackedPair",
    } == {model.__name__ for model in MODELS}


@pytest.mark.parametrize(
    ("model", "field"), [(model.__name__, field) for model in MODELS for field in model.model_fields]
)
def test_every_field_is_described(model: str, field: str):
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{field}`" in line]
    assert rows, f"docs/results.md does not describe {field} of {model}"


def test_no_row_field_is_described_that_does_not_exist():
    section = PAGE.split("## Rows")[1].split("`tool`:")[0]
    described = set(re.findall(r"^\| `([a-z0-9_]+)` \|", section, re.MULTILINE))
    assert described == set(results.Row.model_fields)


def test_the_table_of_measures_is_what_they_declare():
    spec = importlib.util.spec_from_file_location("update_results_page", ROOT / "tools" / "update_results_page.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.page(PAGE) == PAGE, "run: python tools/update_results_page.py"
    with pytest.raises(UserError, match="must occur once each"):
        tool.page(PAGE.replace(tool.END, ""))


def test_every_measure_of_a_field_names_one_of_the_row():
    for measure in all_measures():
        for field in (measure.field, measure.interval_field):
            assert field is None or field in results.Row.model_fields, measure.name


def test_page_is_about_this_version_and_these_constants():
    assert f"**metrics version {results.METRICS_VERSION}**" in PAGE
    assert f"{RESAMPLES:,}".replace(",", " ") + " resamples" in PAGE
    assert str(SCALING_EXPONENT) in PAGE
    assert f"within {100 * SAME_SIZE:g} %" in PAGE
    assert f"at most {100 * SMALL_LOSS:g} % of H" in PAGE
    assert f"over {100 * SMALL:g} % smaller than bf16" in PAGE
    assert f"Above {results.FOREIGN_LIMIT} the timing is marked" in PAGE
    assert f"with a note above {100 * results.DRIFT_LIMIT:g} %" in PAGE
    assert f"A fraction above {ABOVE_LIMIT} is" in PAGE
    assert all(f"`{target}`" in PAGE for target in get_args(results.Target))
    fewer = 1 - (1 + SMALL_LOSS) ** (-1 / SCALING_EXPONENT)
    assert f"an unquantized model of {100 * fewer:.0f} % fewer parameters would lose" in PAGE
    for scenario in SCENARIOS:
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{scenario}` |")]
        weights = WEIGHTS[scenario]
        for weight, what in ((weights.size, "size gain"), (weights.speed, "speed gain"), (weights.loss, "loss")):
            assert (f"{round(3 * weight)}/3 {what}" in line) == (weight > 0)


def test_example_of_the_ceiling_is_right():
    ceiling = math.log(10) * (5**SCALING_EXPONENT - 1)
    assert f"a KL of {ceiling:.2f}" in PAGE
