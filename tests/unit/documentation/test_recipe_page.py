"""docs/recipes.md against core/recipe.py: every key, default and allowed value; the shipped recipes; the example."""

import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic_core import PydanticUndefined

from quern.core.recipe import (
    Activations,
    Calibration,
    Override,
    Recipe,
    Rounding,
    Transform,
    WeightScheme,
    parse_recipe,
    profile_names,
)

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "recipes.md").read_text("utf-8")
SECTIONS = {
    "## Keys": (Recipe,),
    "### `weights`, `embedding`, `head`, and each of `overrides`": (WeightScheme, Override),
    "### each of `transforms`": (Transform,),
    "### `rounding`": (Rounding,),
    "### `activations`": (Activations,),
    "### `calibration`": (Calibration,),
}
IN_WORDS = {"see below", "not quantized", ""}


def table(heading: str) -> dict[str, list[str]]:
    """Rows below ``heading`` by their first cell's code."""
    text = PAGE.split(f"{heading}\n", 1)[1]
    text = re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("heading", SECTIONS)
def test_keys_defaults_and_values(heading):
    fields = {name: field for model in SECTIONS[heading] for name, field in model.model_fields.items()}
    documented = table(heading)
    assert set(documented) == set(fields)
    for name, (default, meaning) in documented.items():
        field = fields[name]
        if field.default is PydanticUndefined:
            assert default == "", name
        elif default not in IN_WORDS:
            plain = list(field.default) if isinstance(field.default, tuple) else field.default
            assert json.loads(default.strip("`")) == plain, name
        if get_origin(field.annotation) is Literal:
            missing = [value for value in get_args(field.annotation) if f"`{value}`" not in meaning]
            assert not missing, name


def test_what_the_tables_say_in_words():
    recipe = Recipe(name="x")
    assert not recipe.embedding.quantized
    assert not recipe.head.quantized
    assert recipe.weights == WeightScheme()


def test_every_shipped_recipe_is_described():
    assert set(table("## Shipped recipes")) == set(profile_names())


def test_the_example_is_a_recipe():
    example = re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[1]
    recipe = parse_recipe(yaml.safe_load(example), "docs/recipes.md")
    assert recipe.scheme_for("model.layers.3.mlp.down_proj").bits == 8
    assert recipe.scheme_for("model.layers.3.mlp.up_proj").bits == 4
