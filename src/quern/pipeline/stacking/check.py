"""Whether the parts of a recipe go together, and whether a runtime runs what it makes; before any work is done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.files import read_json
from quern.core.artifact import PROVENANCE
from quern.core.errors import UserError, option
from quern.core.progress import Progress
from quern.core.recipe import Recipe, load_recipe, parse_recipe, profile_names
from quern.core.stacking import Answer, Label, Part, losing
from quern.core.text.language import gettext
from quern.core.text.suggest import did_you_mean
from quern.engines.base import ENGINES
from quern.engines.cpu import cache_named
from quern.formats.base import FORMATS
from quern.loading.fitting import model_config, open_original, open_stored
from quern.loading.padding import padded
from quern.pipeline.blockwise.job import keeping, plan_of
from quern.pipeline.stacking.answer import ordinary_architecture, plain_reason, use_obstacle, writer_for
from quern.pipeline.stacking.matrix import Cell, cell_of
from quern.pipeline.stacking.parts import RUNTIMES, parts_of, traits_of
from quern.pipeline.stacking.tensor_parallel import SIZES, ParallelSize, parallel_sizes, refusal

VLLM = "vllm"
MOST_GPUS = 1024


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
    tensor_parallel: list[ParallelSize] = field(default_factory=list)
    """On how many GPUs vLLM can run it; empty for other runtimes and without a model."""


def check(
    recipe: str | Path | Recipe,
    *,
    runtime: str | None = None,
    cache: str | None = None,
    model: str | Path | None = None,
    tensor_parallel: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Whether the parts of ``recipe`` go together, with a key/value ``cache`` and for a ``runtime`` if they are given.

    ``recipe`` may also be the folder of an artifact, which has a model of its own. ``model``: checked for that one (its
    shapes, biases, tied head) and not for an ordinary decoder; none of its weights are read. ``tensor_parallel``: refused
    unless vLLM can cut the model for so many GPUs. Raises ``UserError`` for a recipe that cannot be read and for names
    that nobody knows.
    """
    refuse_unknown(runtime, cache)
    _refuse_parallel(tensor_parallel, runtime)
    architecture = ordinary_architecture()
    notes: list[str] = []
    problems: list[str] = []
    known = model is not None
    if not isinstance(recipe, Recipe) and str(recipe) not in profile_names() and Path(recipe).is_dir():
        chosen, architecture = _artifact(Path(recipe), model, progress)
        known = True
    else:
        chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if model is not None:
        checkpoint = padded(open_original(model, progress=progress), chosen.padding)
        architecture = architecture_of(model_config(checkpoint))
        notes += checkpoint.notes
        if runtime == "cpu" and (unknown := ENGINES.get("cpu")().runs(checkpoint)) is not None:
            problems.append(gettext("the cpu engine does not run it: {why}", why=unknown))
    problems += _problems(chosen, architecture, runtime, cache)
    if problems and runtime is not None:
        notes += _elsewhere(chosen, architecture, runtime, cache)
    parallel = _parallel(chosen, architecture, tensor_parallel) if runtime == VLLM and known else []
    problems += _parallel_problems(parallel, tensor_parallel)
    if not problems:
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
    named = str(recipe if model is None else model) if known else None
    return CheckReport(chosen.name, runtime, cache, named, label, parts, problems, degrading, notes, parallel)


def _artifact(path: Path, model: str | Path | None, progress: Progress | None) -> tuple[Recipe, Architecture]:
    """Recipe and architecture of an artifact as it is stored."""
    if model is not None:
        raise UserError(
            gettext(
                "{path} is an artifact, which has its own model. Leave out {option}, or name a recipe",
                path=path,
                option=option("model", "--model"),
            )
        )
    provenance = path / PROVENANCE
    found = read_json(provenance).get("fingerprint") if provenance.is_file() else None
    if not isinstance(found, dict):
        raise UserError(
            gettext(
                "{path} is no artifact: no {provenance} says how it was made. Name a recipe, or the folder of an artifact",
                path=path,
                provenance=PROVENANCE,
            )
        )
    recipe = parse_recipe(found.get("recipe"), f"of {path}")
    return recipe, architecture_of(model_config(open_stored(path, progress=progress)))


def _refuse_parallel(size: int | None, runtime: str | None) -> None:
    named = option("tensor_parallel", "--tensor-parallel")
    if size is not None and (type(size) is not int or not 1 <= size <= MOST_GPUS):
        given = {"option": named, "size": size, "most": MOST_GPUS}
        raise UserError(gettext("{option} is {size!r}; it must be a whole number of GPUs from 1 to {most}", **given))
    if size is not None and runtime != VLLM:
        wanted = option(f"runtime={VLLM!r}", f"--for {VLLM}")
        raise UserError(gettext("{option} is about vLLM. Add {wanted}", option=named, wanted=wanted))


def _parallel(recipe: Recipe, architecture: Architecture, size: int | None) -> list[ParallelSize]:
    sizes = sorted({*SIZES, *([] if size is None else [size])})
    return parallel_sizes(plan_of(recipe, architecture), architecture, recipe.format, sizes)


def _parallel_problems(parallel: list[ParallelSize], size: int | None) -> list[str]:
    """Why vLLM does not cut the model for so many GPUs."""
    if size is None:
        return []
    if not parallel:
        named = option("model", "--model")
        raise UserError(
            gettext(
                "which sizes fit depends on the model. Add {option}, or give an artifact in place of the recipe",
                option=named,
            )
        )
    (asked,) = [one for one in parallel if one.size == size]
    if not asked.problems:
        return []
    return [gettext("on {size} GPUs: {problem}", size=size, problem=refusal(asked))]


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
