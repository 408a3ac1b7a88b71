"""Where a row can be deployed, and under which licence the tool that made it stands."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from quern.core.errors import UserError
from quern.core.recipe import Recipe
from quern.core.results import Row, Target
from quern.core.text.language import gettext
from quern.formats.base import obstacles_of, runtimes_of

QUERN_LICENCE = "Apache-2.0"

_UNQUANTIZED: tuple[Target, ...] = ("transformers", "vllm", "quern")
"""What loads a Hugging Face checkpoint without a conversion."""
_BY_RUNTIME: dict[str, Target] = {
    "transformers": "transformers",
    "vllm": "vllm",
    "libllama": "llama.cpp",
    "llama.cpp": "llama.cpp",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
}
"""What the names of tools' runtimes begin with."""


def targets_of(row: Row) -> tuple[str, ...]:
    """The runtimes that load the row's artifact: as its tool declares, or by quern's own formats."""
    if row.tool is not None:
        return tuple(row.tool.targets)
    if row.kind == "unquantized":
        return _UNQUANTIZED
    recipe = _recipe_of(row)
    return ("quern",) if recipe is None else runtimes_of(recipe)


def obstacle_to(row: Row, target: Target) -> str:
    """Why ``target`` does not run the row's artifact as it is, where more is known than that it does not read its format."""
    recipe = _recipe_of(row)
    found = [] if recipe is None else [obstacle for obstacle in obstacles_of(recipe) if obstacle.target == target]
    return "; ".join(f"{obstacle.target} {obstacle.reason}" for obstacle in found)


def _recipe_of(row: Row) -> Recipe | None:
    """The recipe of a row that quern made; None where this version does not know it."""
    try:
        return Recipe.model_validate(row.recipe) if row.kind == "quern" else None
    except (ValidationError, UserError):
        return None


def runtime_of(row: Row) -> str:
    """In what the row was measured, in words."""
    return row.tool.runtime if row.tool is not None else gettext("quern, engine {engine}", engine=row.engine)


def runtime_target(row: Row) -> Target | None:
    """The target whose speed was measured; None where that is unknown. Whatever plugs into transformers counts as it."""
    if row.tool is None:
        return "transformers" if row.engine == "reference" else "quern"
    words = row.tool.runtime.casefold()
    return next((target for beginning, target in _BY_RUNTIME.items() if words.startswith(beginning)), None)


def targets_text(row: Row) -> str:
    """The runtimes that load the row's artifact, in words."""
    return gettext(", ").join(targets_of(row)) or gettext("nothing that is known")


def licence_of(row: Row) -> str | None:
    """SPDX identifier of the tool's licence; None for the unquantized model, which no tool made."""
    if row.tool is not None:
        return row.tool.licence
    return None if row.kind == "unquantized" else QUERN_LICENCE


def maker_of(row: Row, quern_version: str) -> tuple[str, str] | None:
    """Name and version of the tool that made the row; None for the unquantized model."""
    if row.tool is not None:
        return row.tool.name, row.tool.version
    return None if row.kind == "unquantized" else ("quern", quern_version)


def has_other_tools(rows: Iterable[Row]) -> bool:
    """Whether a tool other than quern made one of the rows."""
    return any(row.kind == "peer" for row in rows)
