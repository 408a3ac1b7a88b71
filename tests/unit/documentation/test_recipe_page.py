"""docs/recipes.md against the models that read recipes: every key, default and allowed value; the shipped recipes; the examples."""

import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic.fields import FieldInfo

from quern.codecs.base import CODECS, ScaledParameters
from quern.core.allocation import Allocation, AllocationCandidate, Target
from quern.core.errors import UserError
from quern.core.plan import LinearPlan, candidates_for, plan_for
from quern.core.recipe import Override, Recipe, parse_recipe, profile_names
from quern.core.recipe_parts import Activations, Calibration, Padding, Rounding, Transform, Tuning
from quern.core.scheme import NO_CODEC, USUAL, parse_scheme
from quern.observers.base import OBSERVERS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "recipes.md").read_text("utf-8")
OWN_CODECS = [name for name in CODECS.names() if CODECS.get(name).__module__.startswith("quern.codecs.")]


def beside_a_scheme(model: type[Override | AllocationCandidate]) -> dict[str, FieldInfo]:
    """The keys of an override or candidate that are not those of a scheme."""
    return {name: field for name, field in model.model_fields.items() if name != "scheme"}


def differing(codec: str) -> dict[str, FieldInfo]:
    """The keys of a codec that the usual one has not, or with another default."""
    usual = {name: field.default for name, field in CODECS.get(USUAL).Parameters.model_fields.items()}
    fields = CODECS.get(codec).Parameters.model_fields
    return {name: field for name, field in fields.items() if name not in usual or usual[name] != field.default}


SECTIONS = {
    "## Keys": Recipe.model_fields,
    "### each of `overrides`": beside_a_scheme(Override),
    "### each of `transforms`": Transform.model_fields,
    "### `rounding`": Rounding.model_fields,
    "### `activations`": Activations.model_fields,
    "### `calibration`": Calibration.model_fields,
    "### `tuning`": Tuning.model_fields,
    "### `padding`": Padding.model_fields,
    "### `allocation`": Allocation.model_fields,
    "### each of `candidates`": beside_a_scheme(AllocationCandidate),
    "### `target`": Target.model_fields,
    f"### codec `{USUAL}`": CODECS.get(USUAL).Parameters.model_fields,
    **{f"### codec `{name}`": differing(name) for name in OWN_CODECS if name != USUAL},
}
IN_WORDS = {"see below", "not quantized", ""}


def table(heading: str) -> dict[str, list[str]]:
    """Rows below ``heading`` by their first cell's code."""
    text = PAGE.split(f"\n{heading}\n", 1)[1]
    text = re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("heading", SECTIONS)
def test_keys_defaults_and_values(heading):
    fields = SECTIONS[heading]
    documented = table(heading)
    assert set(documented) == set(fields)
    for name, (default, meaning) in documented.items():
        field = fields[name]
        if field.is_required():
            assert default == "", name
        elif default not in IN_WORDS:
            plain = list(field.default) if isinstance(field.default, tuple) else field.default
            assert json.loads(default.strip("`")) == plain, name
        if get_origin(field.annotation) is Literal:
            missing = [value for value in get_args(field.annotation) if f"`{value}`" not in meaning]
            assert not missing, name


def test_the_codecs():
    ((key, (default, meaning)),) = table("### `weights`, `embedding`, `head`").items()
    assert (key, json.loads(default.strip("`"))) == ("codec", USUAL)
    assert all(f"`{name}`" in meaning for name in (*OWN_CODECS, NO_CODEC))


def test_the_observers():
    assert set(table("#### observers")) == set(OBSERVERS.names())


def test_what_the_tables_say_in_words():
    recipe = Recipe(name="x")
    assert not recipe.embedding.quantized
    assert not recipe.head.quantized
    assert recipe.weights == parse_scheme({"codec": USUAL})


def test_every_shipped_recipe_is_described():
    assert set(table("## Shipped recipes")) == set(profile_names())


def example(position: int) -> Recipe:
    """One of the page's recipes."""
    text = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[position]
    return parse_recipe(yaml.safe_load(text), "docs/recipes.md")


def test_the_example_is_a_recipe():
    recipe = example(0)
    bits = [
        plan_for(recipe, f"model.layers.3.mlp.{name}").scheme.to_json()["bits"] for name in ("down_proj", "up_proj")
    ]
    assert bits == [8, 4]


def test_the_example_of_overrides_does_what_is_said_below_it():
    recipe = example(1)
    trellis, dynamic = parse_scheme({"codec": "trellis", "bits": 3}), Activations(mode="dynamic")
    int8, usual = parse_scheme({"bits": 8, "granularity": "channel"}), parse_scheme({"bits": 4, "group_size": 64})
    rotation = Transform(method="hadamard")
    assert {name: plan_for(recipe, f"model.layers.0.{name}") for name in (
        "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.q_proj",
    )} == {
        "mlp.up_proj": LinearPlan(trellis, Rounding(), rotation),
        "mlp.down_proj": LinearPlan(trellis, Rounding(method="nearest"), None),
        "self_attn.v_proj": LinearPlan(int8, Rounding(), rotation, dynamic),
        "self_attn.q_proj": LinearPlan(usual, Rounding(), rotation),
    }  # fmt: skip


def test_the_example_of_an_allocation_does_what_is_said_below_it():
    recipe = example(3)
    value, others = (candidates_for(recipe, f"model.layers.1.{name}") for name in ("self_attn.v_proj", "mlp.up_proj"))
    assert [plan.scheme.to_json()["bits"] for plan in value] == [8]
    assert [plan.scheme.to_json()["bits"] for plan in others] == [2, 3, 8]
    assert [plan.rotation is not None for plan in others] == [True, True, False]
    assert recipe.allocation.target == Target(bits=3.0)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"weights": {"window": 7}}, "unknown key"),
        ({"weights": {"codec": "trellis", "groups": 2}}, "unknown key"),
        ({"overrides": [{"pattern": "*", "rotated": True}]}, "no transform that rotates"),
    ],
)
def test_what_the_page_calls_refused(choices, told):
    with pytest.raises(UserError, match=told):
        parse_recipe({"name": "x", **choices}, "x")


def test_keys_of_a_part_go_together():
    parent = {"bits": 8, "symmetric": False, "observer": "min_max"}
    recipe = parse_recipe(
        {"name": "x", "weights": parent, "rounding": {"damping": 0.5},
         "overrides": [{"pattern": "*.a", "bits": 3}, {"pattern": "*.a", "rounding": {"block_size": 4}}]}, "x",
    )  # fmt: skip
    assert plan_for(recipe, "x.a") == LinearPlan(parse_scheme({"bits": 3}), Rounding(block_size=4))
    assert plan_for(recipe, "x.b") == LinearPlan(parse_scheme(parent), Rounding(damping=0.5))
    assert isinstance(recipe.weights.params, ScaledParameters)
