"""What the page shows, as plain data: every figure already written out. Reads results only and measures nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from quern.advisor.recommend import pareto_front, recommend
from quern.advisor.retold import retold
from quern.advisor.scoring import WEIGHTS
from quern.core.results import Recommendation, Results, Row, Scenario, unquantized_row
from quern.core.text.language import gettext, ngettext, spoken, translatable
from quern.core.text.units import bytes_text, percent_text, significant
from quern.evaluation.measures.base import MEASURES, Measure
from quern.report.columns import columns_of, detail_of, kind_of, text_of
from quern.report.grids import layer_grid, plan_grids, plan_tables
from quern.report.provenance import flatten, machine_line, model_line, model_name, recipe_view, run_facts
from quern.report.stacking import stacking_view
from quern.report.tools import has_tools_view, tool_rows, tools_view

SCENARIO_TEXTS: dict[Scenario, tuple[str, str]] = {
    "storage": (translatable("Storage"), translatable("Many copies, little memory")),
    "speed": (translatable("Speed"), translatable("Real-time translation, voice, customer service")),
    "overall": (translatable("Overall"), translatable("Size, speed and accuracy alike")),
}


HTML_LANGUAGES = {"zh": "zh-Hans"}
"""What a page says of its language, where that is more than the code."""


def page_view(results: Results) -> dict[str, Any]:
    """Everything the template needs."""
    results = results.model_copy(update={"recommendation": retold(results)})
    front, columns = pareto_front(results.rows), _filled(results)
    made = tool_rows(results) if has_tools_view(results) else [None] * len(results.rows)
    chosen = next((row for row in results.rows if row.name == results.recommendation.choice), None)
    return {
        "page_language": HTML_LANGUAGES.get(spoken(), spoken()),
        "lead": _lead(results),
        "title": model_name(results),
        "subtitle": model_line(results),
        "verdict": verdict(chosen, results),
        "tiles": _tiles(chosen, results.rows) if chosen else [],
        "scenario": results.recommendation.scenario,
        "panels": _panels(results),
        "columns": [
            {
                "key": c.name,
                "label": gettext(c.title),
                "unit": c.shown_unit,
                "help": gettext(c.help),
                "better": c.better,
            }
            for c in columns
        ],
        "unmeasured": [gettext(column.title).lower() for column in columns_of(results) if column not in columns],
        "noise_floor": _noise_floor(results.rows),
        "rows": [
            _table_row(place, row, columns, results, on_front=row.name in front) | {"made": made[place]}
            for place, row in enumerate(results.rows)
        ],
        "chips": _chips(results.rows),
        "tools": tools_view(results),
        "has_layers": any(row.layers for row in results.rows),
        "plans": plan_tables(results.rows),
        "stacking": stacking_view(results),
        "recipes": [recipe_view(row) for row in results.rows],
        "facts": run_facts(results),
        "hardware": list(flatten(results.hardware)),
        "versions": sorted(results.versions.items()),
        "texts": [
            {"name": t.name, "sha256": t.sha256, "tokens": f"{t.tokens:,}", "taken": t.taken} for t in results.texts
        ],
        "metrics_version": results.metrics_version,
    }


def page_data(results: Results) -> dict[str, Any]:
    """What the page's own script draws from: plain numbers and their written form."""
    front, columns, tools = pareto_front(results.rows), _filled(results), tools_view(results)
    made = tool_rows(results) if tools else [{}] * len(results.rows)
    return {
        "columns": [
            {
                "key": c.name,
                "label": gettext(c.title),
                "title": c.title,
                "unit": c.shown_unit,
                "better": c.better,
                "kind": kind_of(c),
            }
            for c in columns
        ],
        "rows": [
            {
                "id": place,
                "name": row.name,
                "choice": row.name == results.recommendation.choice,
                "front": row.name in front,
                "reference": row.kind == "unquantized",
                "values": {c.name: c.value(row) for c in columns} | ({"place": made[place]["rank"]} if tools else {}),
                "texts": {c.name: _with_unit(c, row) for c in columns},
                "ranges": {c.name: limits for c in columns if (limits := c.range(row)) is not None},
                **made[place],
            }
            for place, row in enumerate(results.rows)
        ],
        "noise_floor": _noise_floor(results.rows),
        "file_name": tools["file_name"] if tools else "",
        "layers": [layer_grid(row.name, row.layers) for row in results.rows if row.layers],
        "plans": plan_grids(results.rows),
    }


def _filled(results: Results) -> list[Measure]:
    """The columns of which a row has a value."""
    return [column for column in columns_of(results) if any(column.value(row) is not None for row in results.rows)]


def verdict(chosen: Row | None, results: Results) -> tuple[str, str, str]:
    """The answer in one sentence, in three parts of which the middle one is the name of the choice."""
    if chosen is None:
        return gettext("Nothing that was measured keeps within the limits."), "", ""
    if chosen.kind == "unquantized":
        return gettext("Stay with the unquantized model: nothing quantized serves better here."), "", ""
    gains = []
    if chosen.compression > 0:
        gains.append(gettext("{change} smaller than bf16", change=percent_text(chosen.compression)))
    reference = unquantized_row(results.rows)
    if reference and reference.decode_tokens_per_s and chosen.decode_tokens_per_s:
        factor = f"{chosen.decode_tokens_per_s / reference.decode_tokens_per_s:.2f}"
        gains.append(gettext("{factor} times the decode speed", factor=factor))
    if chosen.kl_mean is not None:
        gains.append(f"KL {significant(chosen.kl_mean)}")
    rest = gettext(": {gains}.", gains=gettext(", ").join(gains)) if gains else gettext(".")
    return gettext("Use "), chosen.name, rest


def _lead(results: Results) -> str:
    count, machine = len(results.rows), machine_line(results.hardware)
    told = {"scenario": results.recommendation.scenario, "count": count, "machine": machine}
    if not machine:
        return ngettext(
            "For the {scenario} scenario, out of {count} contender measured side by side.",
            "For the {scenario} scenario, out of {count} contenders measured side by side.",
            count,
            **told,
        )
    return ngettext(
        "For the {scenario} scenario, out of {count} contender measured side by side on {machine}.",
        "For the {scenario} scenario, out of {count} contenders measured side by side on {machine}.",
        count,
        **told,
    )


def _tiles(chosen: Row, rows: Sequence[Row]) -> list[dict[str, str]]:
    """The choice's headline numbers, each with what it is to be compared with."""
    reference = unquantized_row([row for row in rows if row is not chosen])
    floor = _noise_floor(rows)
    notes = {
        "size": f"bf16: {bytes_text(chosen.bytes / (1 - chosen.compression))}",
        "kl": gettext("noise floor: {floor}", floor=significant(floor)) if floor is not None else "",
    }
    tiles = []
    for key in ("size", "kl", "decode", "first"):
        column = MEASURES.get(key)
        text = text_of(column, chosen)
        if text is None:
            continue
        compared = text_of(column, reference) if reference else None
        note = notes.get(key) or (gettext("unquantized: {figure}", figure=compared) if compared else "")
        value, _, unit = text.partition(" ")
        tiles.append({"label": gettext(column.title), "value": value, "unit": unit or column.shown_unit, "note": note})
    return tiles


def _panels(results: Results) -> list[dict[str, Any]]:
    """One for each scenario that brings its own weights, and one for a mix if that is what was recommended for."""
    stored = results.recommendation.scenario
    return [_panel(results, scenario) for scenario in (*WEIGHTS, *([stored] if stored not in WEIGHTS else []))]


def _panel(results: Results, scenario: Scenario) -> dict[str, Any]:
    stored = results.recommendation
    outcome: Recommendation = stored if scenario == stored.scenario else recommend(results, scenario)
    scores = [entry.score for entry in outcome.ranking]
    low, high = min([0.0, *scores]), max([0.0, *scores])
    span = high - low or 1.0
    named = SCENARIO_TEXTS.get(scenario)
    label, purpose = map(gettext, named) if named else (gettext("Mix"), _mix_text(outcome))
    return {
        "key": scenario,
        "label": label,
        "purpose": purpose,
        "choice": outcome.choice,
        "reasons": outcome.reasons,
        "ranking": [
            {
                "name": entry.name,
                "score": f"{entry.score:+.2f}",
                "reason": entry.reason,
                "start": round(100 * (min(entry.score, 0.0) - low) / span, 2),
                "width": round(100 * abs(entry.score) / span, 2),
            }
            for entry in outcome.ranking
        ],
        "excluded": [{"name": entry.name, "reason": entry.reason} for entry in outcome.excluded],
    }


def _mix_text(outcome: Recommendation) -> str:
    shares = (outcome.weights or {}).items()
    told = gettext(", ").join(f"{gettext(name)} {percent_text(share)}" for name, share in shares)
    return told.capitalize() or gettext("As weighed")


def _table_row(place: int, row: Row, columns: Sequence[Measure], results: Results, *, on_front: bool) -> dict[str, Any]:
    return {
        "id": place,
        "name": row.name,
        "engine": row.engine,
        "choice": row.name == results.recommendation.choice,
        "reference": row.kind == "unquantized",
        "tags": " ".join(
            tag for tag, holds in (("front", on_front), ("quantized", row.kind != "unquantized")) if holds
        ),
        "on_front": on_front,
        "cells": [
            {
                "key": column.name,
                "label": gettext(column.title),
                "unit": column.shown_unit,
                "value": column.value(row),
                "text": text_of(column, row),
                "detail": detail_of(column, row),
                "best": place in best_places(column, results.rows),
            }
            for column in columns
        ],
    }


def best_places(column: Measure, rows: Sequence[Row]) -> set[int]:
    """The places of the rows with the best value; empty where no row is better than another."""
    values = {
        place: value
        for place, row in enumerate(rows)
        if (value := column.value(row)) is not None and not (column.against_reference and row.kind == "unquantized")
    }
    if len(set(values.values())) < 2:
        return set()
    best = min(values.values()) if column.better == "low" else max(values.values())
    return {place for place, value in values.items() if value == best}


def _chips(rows: Sequence[Row]) -> list[dict[str, str]]:
    chips = [{"tag": "front", "label": gettext("Pareto front only")}]
    if any(row.kind == "unquantized" for row in rows):
        chips.append({"tag": "quantized", "label": gettext("Quantized only")})
    return chips


_UNITS = r"%|bytes|[kMGT]B(?:/s)?|ms|s|min|h|tokens/s|nats|points|halvings|doublings|times"


def unbroken(text: str) -> str:
    """``text`` with spaces between a number and its unit at which no line ends."""
    return re.sub(rf"(?<=\d) (?=(?:{_UNITS})\b|%)", "\u00a0", text)


def _noise_floor(rows: Iterable[Row]) -> float | None:
    floors = [row.kl_noise_floor for row in rows if row.kl_noise_floor is not None]
    return max(floors) if floors else None


def _with_unit(column: Measure, row: Row) -> str | None:
    text = text_of(column, row)
    return f"{text} {column.shown_unit}".strip() if text is not None else None
