"""Whether the parts of a recipe go together, and whether a runtime runs what it makes; before any work is done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from quern.architectures.base import Architecture, architecture_of
from quern.core.errors import UserError, option
from quern.core.progress import Progress
from quern.core.recipe import Recipe, load_recipe
from quern.core.stacking import Answer, Label, Part, losing
from quern.core.text.language import gettext
from quern.core.text.suggest import did_you_mean
from quern.engines.base import ENGINES
from quern.engines.cpu import cache_named
from quern.formats.base import FORMATS
from quern.loading.fitting import model_config, open_original
from quern.pipeline.blockwise.job import keeping
from quern.pipeline.stacking.answer import ordinary_architecture, plain_reason, use_obstacle, writer_for
from quern.pipeline.stacking.matrix import Cell, cell_of
from quern.pipeline.stacking.parts import RUNTIMES, parts_of, traits_of


@dataclass(frozen=True)
class CheckReport:
    """What becomes of a recipe."""

    recipe: str
    runtime: str | None
    cache: str | None
    model: str | None
    """For which it was checked; None: an ordinary decoder."""
    label: Label
    parts: list[Part]
    problems: list[str]
    """Why it is refused; none if it is not."""
    degrading: list[Cell]
    """Pairs of its parts of which one loses by the other."""
    notes: list[str] = field(default_factory=list)


def check(
    recipe: str | Path | Recipe,
    *,
    runtime: str | None = None,
    cache: str | None = None,
    model: str | Path | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Whether the parts of ``recipe`` go together, with a key/value ``cache`` and for a ``runtime`` if they are given.

    ``model``: checked for that one (its shapes, biases, tied head) and not for an ordinary decoder; none of its weights are
    read. Raises ``UserError`` for a recipe that cannot be read and for names that nobody knows.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    refuse_unknown(runtime, cache)
    architecture = ordinary_architecture()
    notes: list[str] = []
    problems: list[str] = []
    if model is not None:
        checkpoint = open_original(model, progress=progress)
        architecture = architecture_of(model_config(checkpoint))
        notes += checkpoint.notes
        if runtime == "cpu" and (unknown := ENGINES.get("cpu")().runs(checkpoint)) is not None:
            problems.append(gettext("the cpu engine does not run it: {why}", why=unknown))
    problems += _problems(chosen, architecture, runtime, cache)
    if problems and runtime is not None:
        notes += _elsewhere(chosen, architecture, runtime, cache)
    elif not problems:
        writer = writer_for(chosen, architecture)
        notes += writer.notes()
        if keeping(writer.plan):
            notes.append(
                gettext("it is for models that are quantized in its schemes already, which no weights were read to see")
            )
    parts = parts_of(chosen, cache, runtime)
    lost = list(losing({part: traits_of(part, chosen) for part in parts}))
    degrading = [replace(cell_of(first, second), answer=Answer("degrades", why)) for first, second, why in lost]
    label: Label = "refuses" if problems else "degrades" if degrading else "works"
    named = None if model is None else str(model)
    return CheckReport(chosen.name, runtime, cache, named, label, parts, problems, degrading, notes)


def refuse_unknown(runtime: str | None, cache: str | None) -> None:
    """Raises ``UserError`` for a runtime or a key/value cache that nobody knows; None is none."""
    if runtime is not None and runtime not in RUNTIMES:
        given = option(f"runtime={runtime!r}", f"--for {runtime}")
        raise UserError(
            gettext(
                "{given} is not known; known: {known}{hint}",
                given=given,
                known=", ".join(RUNTIMES),
                hint=did_you_mean(runtime, RUNTIMES),
            )
        )
    cache_named(cache, "cpu")


def _problems(recipe: Recipe, architecture: Architecture, runtime: str | None, cache: str | None) -> list[str]:
    """Why the recipe is refused for the model, or its artifact by the runtime."""
    try:
        writer_for(recipe, architecture)
    except UserError as error:
        return [plain_reason(error)]
    why = use_obstacle(recipe, cache, [] if runtime is None else [runtime])
    return [] if why is None else [why]


def _elsewhere(recipe: Recipe, architecture: Architecture, runtime: str, cache: str | None) -> list[str]:
    """Of other formats that the runtime reads: whether the recipe would do in them."""
    notes = []
    for name in FORMATS.names():
        if name == recipe.format or runtime not in FORMATS.get(name).runtimes:
            continue
        why = _problems(recipe.model_copy(update={"format": name}), architecture, runtime, cache)
        notes.append(
            gettext("in the format {format} it is refused as well: {why}", format=name, why=gettext("; ").join(why))
            if why
            else gettext("in the format {format} it works", format=name)
        )
    return notes
