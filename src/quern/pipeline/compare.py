"""The side-by-side run: quantize one model by several recipes, measure all of them, recommend one."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import quern
from quern.advisor.hardware import probe
from quern.advisor.recommend import recommend
from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.checkpoint.files import read_json, write_bytes, write_json
from quern.core.errors import UserError
from quern.core.parallel import available_threads
from quern.core.progress import Progress, Silent
from quern.core.recipe import Recipe, load_recipe
from quern.core.results import METRICS_VERSION, Model, Results, Scenario
from quern.engines.base import AUTO, engine_for
from quern.evaluation.choice import ChoiceSet
from quern.evaluation.texts import Text
from quern.pipeline.evaluate import measure_all
from quern.pipeline.inputs import Settings, prepare_inputs
from quern.pipeline.quantize import quantize
from quern.pipeline.rows import Contender
from quern.report.html import write_report

DEFAULT_RECIPES = ("compact", "fast", "balanced", "rtn4")
PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


def compare(
    model: str | Path,
    output: str | Path,
    *,
    recipes: Sequence[str | Path | Recipe] = DEFAULT_RECIPES,
    calibration: Sequence[str | Path] = (),
    texts: Sequence[str | Path | Text] = (),
    choices: Sequence[str | Path | ChoiceSet] = (),
    tokens: int = 4096,
    window: int = 1024,
    speed_rounds: int = 3,
    memory: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    scenario: Scenario = "balanced",
    engine: str = AUTO,
    progress: Progress | None = None,
) -> Results:
    """Quantize ``model`` by every recipe and measure the results beside the unquantized model.

    Writes ``results.json``, ``report.html`` and ``artifacts/<recipe>`` into the folder ``output``. Artifacts that are
    there already are kept, an interrupted one continues; ``fresh`` makes all of them again. ``speed_rounds`` 0 leaves
    speed out. ``engine`` runs the results (``auto``: the fastest that can; the unquantized model is measured in the
    reference engine, and in that one too where it can). Raises ``UserError``.
    """
    progress, folder = progress or Silent(), Path(output)
    chosen = _distinct([recipe if isinstance(recipe, Recipe) else load_recipe(recipe) for recipe in recipes])
    checkpoint = open_checkpoint(model, progress=progress)
    settings = Settings(tokens=tokens, window=window, threads=threads, seed=seed, speed_rounds=speed_rounds)
    inputs = prepare_inputs(checkpoint, folder / "cache", texts=texts, choices=choices, settings=settings)
    hardware = probe(threads=threads or available_threads())
    sha256 = checkpoint.sha256(progress)
    contenders = [
        _make(checkpoint, folder, recipe, calibration, memory, threads, seed, fresh, engine, progress)
        for recipe in chosen
    ]
    reference = Contender(name="unquantized", path=checkpoint.path, sha256=sha256)
    if (fast := engine_for(checkpoint, engine)) != reference.engine:
        contenders.insert(0, Contender(name=f"unquantized ({fast})", path=checkpoint.path, engine=fast, sha256=sha256))
    rows = measure_all(contenders, reference, inputs, settings=settings, hardware=hardware, progress=progress)
    results = Results(
        metrics_version=METRICS_VERSION,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        quern_version=quern.__version__,
        model=_model(checkpoint, sha256),
        hardware=hardware,
        versions=_versions(),
        texts=list(inputs.sources),
        seed=seed,
        rows=rows,
        recommendation=recommend(rows, scenario),
    )
    write_bytes(folder / "results.json", (results.model_dump_json(indent=2) + "\n").encode())
    write_report(folder / "results.json", folder / "report.html")
    return results


def _distinct(recipes: list[Recipe]) -> list[Recipe]:
    names = [recipe.name for recipe in recipes]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not recipes or repeated:
        problem = f"{', '.join(repeated)} twice" if repeated else "none"
        raise UserError(f"--recipes: every recipe once, at least one; got {problem}")
    return recipes


def _make(
    checkpoint: Checkpoint,
    folder: Path,
    recipe: Recipe,
    calibration: Sequence[str | Path],
    memory: int | None,
    threads: int | None,
    seed: int,
    fresh: bool,
    engine: str,
    progress: Progress,
) -> Contender:
    """Quantize by one recipe, or find that it was done; how long it took is kept beside the artifact."""
    progress.log(f"quantizing by {recipe.name}")
    artifact, timing = folder / "artifacts" / recipe.name, folder / "artifacts" / f"{recipe.name}.json"
    report = quantize(
        checkpoint.path,
        artifact,
        recipe=recipe,
        calibration=calibration,
        memory=memory,
        seed=seed,
        fresh=fresh,
        threads=threads,
        progress=progress,
    )
    made = open_checkpoint(artifact)
    sha256 = made.sha256()
    if report.seconds is not None and not report.resumed:
        write_json(timing, {"artifact_sha256": sha256, "quantize_seconds": report.seconds})
    known = read_json(timing) if timing.is_file() else {}
    seconds = known["quantize_seconds"] if known.get("artifact_sha256") == sha256 else None
    return Contender(
        name=recipe.name,
        path=artifact,
        recipe=recipe.to_json(),
        quantize_seconds=seconds,
        layers=tuple(report.layers),
        engine=engine_for(made, engine),
        sha256=sha256,
    )


def _model(checkpoint: Checkpoint, sha256: str) -> Model:
    return Model(
        path=str(checkpoint.path),
        sha256=sha256,
        parameters=checkpoint.parameters,
        architecture=architecture_of(checkpoint.config).model_type,
        bf16_bytes=checkpoint.bf16_bytes,
    )


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "quern": quern.__version__, **found}
