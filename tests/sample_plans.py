"""Rows whose recipe says of each linear what it became, as an allocation decides it; made up, no model needed."""

from __future__ import annotations

from typing import Any

from sample_results import LINEARS, make_row, sample_results, sample_rows, sample_with

from quern.advisor.recommend import recommend
from quern.core.recipe import Recipe, parse_recipe
from quern.core.results import LayerError, Results, Row
from quern.core.scheme import CodecScheme

TRELLIS = {"codec": "trellis", "window": 7, "tables": 1}
EIGHT = {"bits": 8, "granularity": "channel"}
FOUR = {"bits": 4, "symmetric": False, "group_size": 32}
SCHEMES: tuple[dict[str, Any], ...] = (*({**TRELLIS, "bits": bits} for bits in (2, 3, 4)), EIGHT)


def scheme_at(depth: int, linear: str) -> dict[str, Any]:
    """The first and last blocks get more, as do ``v_proj`` and ``down_proj``."""
    place = 1 if linear.startswith("mlp") else 2
    place += linear.endswith(("v_proj", "down_proj")) + (depth == 0) - (depth % 3 == 2)
    return SCHEMES[max(0, min(place, 3))]


def planned_recipe(name: str, blocks: int, **changes: Any) -> Recipe:
    """With an override for each linear of ``blocks`` blocks."""
    overrides = [
        {"pattern": f"model.layers.{depth}.{linear}", **scheme_at(depth, linear)}
        for depth in range(blocks)
        for linear in LINEARS
    ]
    data = {"name": name, "weights": SCHEMES[1], "overrides": overrides, "embedding": FOUR, "head": EIGHT}
    return parse_recipe({**data, "transforms": [{"method": "hadamard"}], **changes}, name)


def planned_row(name: str = "auto", *, blocks: int = 4, losses: bool = True, **changes: Any) -> Row:
    """A row of such a recipe, with a head of its own; relative errors 4^-bits, predicted losses a tenth of that."""
    recipe = planned_recipe(name, blocks, **changes.pop("recipe", {}))
    linears = {o.pattern: o.scheme for o in recipe.overrides if o.scheme is not None and o.scheme.quantized}
    every = {"model.embed_tokens": recipe.embedding, **linears, "lm_head": recipe.head}
    layers = [_layer(linear, scheme, losses) for linear, scheme in every.items()]
    return make_row(name, recipe=recipe.to_json(), layers=layers, **changes)


def _layer(linear: str, scheme: CodecScheme, losses: bool) -> LayerError:
    bits = scheme.to_json()["bits"]
    error = 4.0**-bits
    return LayerError(
        linear=linear,
        bits_per_weight=bits + 0.0625,
        relative_error=error,
        predicted_loss=error / 10 if losses else None,
    )


def sample_plan_results() -> Results:
    """The sample comparison and two planned rows, of which one does not say what was predicted."""
    scale = sample_results().model.bf16_bytes // 1000
    rows = [
        *sample_rows(),
        planned_row(bytes=3_600_000, compression=1 - 3.6 / scale, kl_mean=0.02),
        planned_row("plan-3bits", losses=False, bytes=3_100_000, compression=1 - 3.1 / scale, kl_mean=0.05),
    ]
    return sample_with(rows, recommend(rows, "overall"))
