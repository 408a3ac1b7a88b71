"""Linears by role and depth: what rounding each one cost, and the scheme that each one got."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from quern.core.errors import UserError
from quern.core.plan import plan_for
from quern.core.recipe import WILDCARDS, Recipe
from quern.core.results import LayerError, Row
from quern.core.scheme import CodecScheme
from quern.core.text.scheme_text import scheme_text
from quern.core.text.units import significant

_DEPTH = re.compile(r"^(?:.*?\.)??(\d{1,6})\.(.+)$")
"""The number of a decoder block in a linear's full name, and the role behind it."""


def layer_grid(name: str, layers: Sequence[LayerError]) -> dict[str, Any]:
    """The errors of one row by role and depth; linears outside the decoder blocks come apart, as ``outside``."""
    cells, outside = _placed(
        {"linear": layer.linear, "bits": layer.bits_per_weight, "error": layer.relative_error} for layer in layers
    )
    return {"name": name, **_laid_out(cells), "outside": outside}


def plan_grids(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What every matrix became, of each row whose recipe overrides and has more than one weight scheme.

    Matrices outside of the decoder blocks are cells over all depths (``depth`` null), in a line of their own above or below.
    ``scheme`` is a place in ``schemes``; ``bits`` are null where a linear is kept, ``loss`` where none was predicted.
    """
    return [grid for row in rows if (grid := _plan_grid(row)) is not None]


def plan_tables(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The same as lines of a table, written out."""
    return [
        {
            "name": grid["name"],
            "losses": any(cell["loss"] is not None for cell in grid["cells"]),
            "lines": [_table_line(cell, grid["schemes"]) for cell in grid["cells"]],
        }
        for grid in plan_grids(rows)
    ]


def _placed(entries: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries inside the decoder blocks, with ``depth`` and ``role`` in words, and those outside."""
    inside: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    for entry in entries:
        match = _DEPTH.match(entry["linear"])
        if match is None:
            outside.append(entry)
        else:
            inside.append({**entry, "depth": int(match[1]), "role": match[2]})
    return inside, outside


def _laid_out(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Roles by the shortest names that tell them apart, number of depths, and the cells with places of roles."""
    roles = list(dict.fromkeys(cell["role"] for cell in cells))
    short = [role.rpartition(".")[2] for role in roles]
    labels = [name if short.count(name) == 1 else role for role, name in zip(roles, short, strict=True)]
    places = {role: place for place, role in enumerate(roles)}
    return {
        "roles": labels,
        "depths": max((cell["depth"] for cell in cells if cell["depth"] is not None), default=-1) + 1,
        "cells": [{**cell, "role": places[cell["role"]]} for cell in cells],
    }


def _plan_grid(row: Row) -> dict[str, Any] | None:
    recipe = _decided(row)
    if recipe is None:
        return None
    measured = [
        {"linear": e.linear, "bits": e.bits_per_weight, "error": e.relative_error, "loss": e.predicted_loss}
        for e in row.layers
    ]
    known = {layer.linear for layer in row.layers}
    named = dict.fromkeys(o.pattern for o in recipe.overrides if WILDCARDS.isdisjoint(o.pattern))
    kept = [
        {"linear": name, "bits": None, "error": None, "loss": None}
        for name in named
        if name not in known and not plan_for(recipe, name).quantized
    ]
    inside, outside = _placed([*measured, *kept])
    if not inside:
        return None
    first = next((place for place, layer in enumerate(row.layers) if _DEPTH.match(layer.linear)), len(row.layers))
    before = {layer.linear for layer in row.layers[:first]}
    schemes: dict[CodecScheme, int] = {}

    def cell(entry: dict[str, Any], scheme: CodecScheme) -> dict[str, Any]:
        return {**entry, "scheme": schemes.setdefault(scheme, len(schemes))}

    around = [{**entry, "depth": None, "role": entry["linear"]} for entry in outside]
    above = [cell(entry, recipe.embedding) for entry in around if entry["linear"] in before]
    blocks = [cell(entry, plan_for(recipe, entry["linear"]).scheme) for entry in inside]
    below = [cell(entry, recipe.head) for entry in around if entry["linear"] not in before]
    if len(schemes) < 2:
        return None
    cells = [*above, *sorted(blocks, key=lambda one: one["depth"]), *below]
    return {"name": row.name, **_laid_out(cells), "schemes": _scheme_lines(cells, schemes)}


def _decided(row: Row) -> Recipe | None:
    """The recipe of a row of quern's, where it says of linears what they became; None where this version cannot read it."""
    if row.kind != "quern":
        return None
    try:
        recipe = Recipe.model_validate(row.recipe)
    except (ValidationError, UserError):
        return None
    return recipe if recipe.overrides and recipe.allocation is None else None


def _scheme_lines(cells: Sequence[Mapping[str, Any]], schemes: Mapping[CodecScheme, int]) -> list[dict[str, Any]]:
    """Of each scheme, in the order of places: what it is, how many matrices have it, least and most bits per weight."""
    lines: list[dict[str, Any]] = []
    for scheme, place in schemes.items():
        having = [cell["bits"] for cell in cells if cell["scheme"] == place]
        bits = [value for value in having if value is not None]
        ends = {"low": min(bits, default=None), "high": max(bits, default=None)}
        lines.append({"text": scheme_text(scheme), "count": len(having), **ends})
    return lines


def _table_line(cell: Mapping[str, Any], schemes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    def text(value: float | None) -> str:
        return "-" if value is None else significant(value) if value == 0 or value >= 0.001 else f"{value:.1e}"

    return {
        "linear": cell["linear"],
        "scheme": schemes[cell["scheme"]]["text"],
        "bits": text(cell["bits"]),
        "error": text(cell["error"]),
        "loss": text(cell["loss"]),
    }
