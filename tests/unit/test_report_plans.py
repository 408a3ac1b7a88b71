"""What the report shows of recipes that give linears more than one scheme: which rows, which cells, which words."""

from __future__ import annotations

from typing import Any

import pytest
from sample_plans import EIGHT, SCHEMES, planned_recipe, planned_row, sample_plan_results, scheme_at
from sample_results import LINEARS, make_reference, make_row, sample_results, sample_rows, sample_with

from quern.advisor.recommend import recommend
from quern.core.recipe import Recipe, load_recipe
from quern.core.results import LayerError, Row
from quern.core.scheme import parse_scheme
from quern.core.text.scheme_text import scheme_text
from quern.report.grids import plan_grids, plan_tables
from quern.report.html import render
from quern.report.view import page_data


def only(row: Row) -> dict[str, Any]:
    (grid,) = plan_grids([row])
    return grid


def test_every_matrix_has_its_scheme_bits_and_losses():
    row = planned_row()
    grid = only(row)
    assert grid["roles"] == ["embed_tokens", *(name.rpartition(".")[2] for name in LINEARS), "lm_head"]
    assert grid["depths"] == 4
    cells = {cell["linear"]: cell for cell in grid["cells"]}
    assert list(cells) == [layer.linear for layer in row.layers]
    for layer in row.layers:
        cell = cells[layer.linear]
        assert (cell["bits"], cell["error"], cell["loss"]) == (
            layer.bits_per_weight, layer.relative_error, layer.predicted_loss,
        )  # fmt: skip
    for depth in range(4):
        for linear in LINEARS:
            cell = cells[f"model.layers.{depth}.{linear}"]
            wanted = scheme_text(parse_scheme(scheme_at(depth, linear)))
            assert (cell["depth"], grid["schemes"][cell["scheme"]]["text"]) == (depth, wanted)
            assert grid["roles"][cell["role"]] == linear.rpartition(".")[2]


def test_embedding_and_head_stand_above_and_below_for_all_depths():
    cells = only(planned_row())["cells"]
    assert [cells[place]["depth"] for place in (0, -1)] == [None, None]
    grid = only(planned_row())
    texts = [grid["schemes"][cells[place]["scheme"]]["text"] for place in (0, -1)]
    assert texts == ["integer 4 bits, symmetric False, group_size 32", "integer 8 bits, granularity channel"]


def test_schemes_are_counted_with_their_bits():
    grid = only(planned_row())
    assert sum(scheme["count"] for scheme in grid["schemes"]) == len(grid["cells"])
    for place, scheme in enumerate(grid["schemes"]):
        bits = [cell["bits"] for cell in grid["cells"] if cell["scheme"] == place]
        assert (scheme["low"], scheme["high"], scheme["count"]) == (min(bits), max(bits), len(bits))


def test_linears_that_a_plan_keeps_are_cells_without_figures():
    kept = "model.layers.1.mlp.up_proj"
    recipe = planned_recipe("auto", 2).to_json()
    overrides = [*recipe["overrides"], {"pattern": kept, "codec": "none"}]
    row = planned_row(blocks=2, recipe={"overrides": overrides})
    assert kept in {layer.linear for layer in row.layers}, "made up with it, and then without"
    row = row.model_copy(update={"layers": [layer for layer in row.layers if layer.linear != kept]})
    grid = only(row)
    (cell,) = [cell for cell in grid["cells"] if cell["bits"] is None]
    assert (cell["linear"], cell["depth"], cell["error"], cell["loss"]) == (kept, 1, None, None)
    assert grid["schemes"][cell["scheme"]] == {"text": "kept", "count": 1, "low": None, "high": None}
    (table,) = plan_tables([row])
    assert {"linear": kept, "scheme": "kept", "bits": "-", "error": "-", "loss": "-"} in table["lines"]


def test_later_overrides_win_and_wildcards_count():
    overrides = [{"pattern": "*.mlp.*", **SCHEMES[0]}, {"pattern": "model.layers.1.mlp.up_proj", **EIGHT}]
    grid = only(planned_row(blocks=2, recipe={"overrides": overrides}).model_copy(update={"layers": [
        LayerError(linear=f"model.layers.{depth}.mlp.{name}", bits_per_weight=2, relative_error=0.1)
        for depth in range(2) for name in ("up_proj", "down_proj")
    ]}))  # fmt: skip
    texts = [grid["schemes"][cell["scheme"]]["text"] for cell in grid["cells"]]
    assert [text.split(",")[0] for text in texts] == ["trellis 2 bits"] * 2 + ["integer 8 bits", "trellis 2 bits"]


def test_table_is_written_out():
    with_losses, without = plan_tables([planned_row(), planned_row("b", losses=False)])
    assert (with_losses["losses"], without["losses"]) == (True, False)
    assert with_losses["lines"][1] == {
        "linear": "model.layers.0.self_attn.q_proj",
        "scheme": "integer 8 bits, granularity channel",
        "bits": "8.06",
        "error": "1.5e-05",
        "loss": "1.5e-06",
    }
    assert {line["loss"] for line in without["lines"]} == {"-"}


@pytest.mark.parametrize(
    "row",
    [
        make_reference(),
        make_row("no layers", recipe=planned_recipe("a", 2).to_json()),
        planned_row(recipe={"overrides": []}),
        make_row(
            "of a later version", recipe={**planned_recipe("a", 2).to_json(), "unheard": 1}, layers=planned_row().layers
        ),
        make_row("unknown codec", recipe={"name": "a", "weights": {"codec": "no"}}, layers=planned_row().layers),
        make_row("not decided", recipe=load_recipe("auto").to_json(), layers=planned_row().layers),
        planned_row(
            recipe={"overrides": [{"pattern": "*", **SCHEMES[1]}], "embedding": SCHEMES[1], "head": SCHEMES[1]}
        ),
    ],
    ids=lambda row: row.name,
)
def test_rows_without_a_plan_have_no_picture(row: Row):
    assert plan_grids([row]) == []


def test_page_has_the_section_only_where_there_is_a_plan():
    plain, planned = render(sample_results()), render(sample_plan_results())
    assert 'id="plans"' not in plain
    assert 'id="plans"' in planned
    assert [grid["name"] for grid in page_data(sample_plan_results())["plans"]] == ["auto", "plan-3bits"]
    assert planned.count("Predicted loss (nats/token)</th>") == 1, "a column only where something was predicted"


def test_hostile_names_are_only_text():
    name = "model.layers.0.<img src=x onerror=alert(1)>"
    row = planned_row()
    bad = [LayerError(linear=name, bits_per_weight=3, relative_error=0.1), *row.layers]
    rows = [*sample_rows(), row.model_copy(update={"layers": bad})]
    text = render(sample_with(rows, recommend(rows, "overall")))
    assert "<img" not in text
    assert "&lt;img src=x" in text


def test_a_row_from_before_predicted_losses_loads():
    data = planned_row().model_dump(mode="json")
    for layer in data["layers"]:
        del layer["predicted_loss"]
    assert [layer.predicted_loss for layer in Row.model_validate(data).layers] == [None] * 30


def test_a_pattern_without_wildcards_means_one_name():
    recipe = Recipe.model_validate(planned_recipe("a", 11).to_json())
    first, last = recipe.overrides[7], recipe.overrides[70]
    assert (first.pattern, last.pattern) == ("model.layers.1.self_attn.q_proj", "model.layers.10.self_attn.q_proj")
    assert [first.matches(last.pattern), first.matches(first.pattern)] == [False, True]
