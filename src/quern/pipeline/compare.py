"""The side-by-side run: quantize one model by several recipes and tools, measure all of them, recommend one."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import quern
from quern.advisor.hardware import probe
from quern.advisor.recommend import recommend
from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.jobs.output_place import write_output
from quern.comparison.inputs import Inputs, MeasurementSettings, prepare_inputs, reference_key
from quern.comparison.measure import Measurement, measure_all
from quern.comparison.measured_cache import MeasuredCache
from quern.comparison.row_builder import Contender
from quern.comparison.worker_process import OURS, as_other_tools
from quern.core.errors import UserError, option
from quern.core.machine.parallel import thread_count
from quern.core.machine.temporary import temporary_folder
from quern.core.progress import Progress, Silent
from quern.core.recipe import Recipe
from quern.core.recipe_parts import TEXT_AUTO, Calibration
from quern.core.results import METRICS_VERSION, Model, Protocol, Results, Scenario
from quern.core.text.language import english
from quern.engines.base import AUTO, engine_for
from quern.engines.cpu import ORDINARY, CachePrecision, cache_named
from quern.evaluation.choice import ChoiceSet
from quern.loading.fitting import open_model, open_original
from quern.peers.base import PeerVariant, peer_variants
from quern.pipeline.artifacts import ArtifactRequest, make_artifact
from quern.pipeline.comparing.comparison_folder import ComparisonFolder
from quern.pipeline.comparing.peers import TIME_LIMIT_S, Tools, make_all
from quern.pipeline.planning.text_budget import settled_recipe
from quern.pipeline.request import chosen_recipe, refuse_files
from quern.pipeline.stacking.matrix import stacking_of
from quern.report.html import render
from quern.texts.source import Text

DEFAULT_RECIPES = ("compact", "fast", "balanced", "rtn4")
QUICK_TOKENS, QUICK_ROUNDS, QUICK_DECODE = 4, 1, 16
"""``quick``: a quarter of the tokens, one timed round, sixteen decoded tokens."""
_WEIGH = option("quern.recommend(results, 'mix', weights=...)", "`quern recommend --scenario mix --weights ...`")
PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


def compare(
    model: str | Path,
    output: str | Path,
    *,
    recipes: Sequence[str | Path | Recipe] = DEFAULT_RECIPES,
    peers: Sequence[str] = (),
    calibration: Sequence[str | Path | Text] = (),
    calibration_tokens: int | Literal["auto"] | None = None,
    calibration_time: float | None = None,
    texts: Sequence[str | Path | Text] = (),
    choices: Sequence[str | Path | ChoiceSet] = (),
    tokens: int = 4096,
    window: int = 1024,
    speed_rounds: int = 3,
    prompt_tokens: int = 512,
    decode_tokens: int = 64,
    quick: bool = False,
    memory: int | None = None,
    peer_time_limit: float = TIME_LIMIT_S,
    environments: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    scenario: Scenario = "overall",
    engine: str = AUTO,
    caches: Sequence[str] = (),
    progress: Progress | None = None,
) -> Results:
    """Quantize ``model`` by every recipe and by other tools, and measure the results beside the unquantized model.

    ``peers`` names other tools (``hqq``: its default variants; ``hqq:int4-g64``: one; ``all``); each runs in an
    environment of its own below ``environments`` (default: the user's cache folder), which is made if it is missing. One
    that fails, takes longer than ``peer_time_limit`` seconds or more than ``memory`` becomes a failure in the results.
    ``calibration_tokens`` hold for all recipes and tools (default: what each recipe says; ``auto``, ``calibration_time``:
    see ``quantize``). ``quick`` measures a quarter of ``tokens`` and one short timed round.

    Writes ``results.json``, ``report.html`` and ``artifacts/<row>`` into the folder ``output``. Artifacts that are there
    already are kept, an interrupted one continues, and what was measured of them under the same settings is not measured
    again; ``fresh`` makes and measures all anew. ``speed_rounds`` 0 leaves speed out. ``engine`` runs quern's results, and
    the unquantized model beside the reference engine (``auto``: the fastest that can). ``caches`` are ways in which the cpu
    engine keeps keys and values (``float16``, ``int8``, ...): each of quern's results has a row with every one of them.
    Raises ``UserError``.
    """
    progress = progress or Silent()
    if scenario == "mix":
        raise UserError(f"a mix needs weights: compare with another scenario, then {_WEIGH}")
    chosen = _chosen(recipes, calibration_tokens)
    others = peer_variants(peers)
    _check_distinct([*(recipe.name for recipe in chosen), *(other.row for other in others)])
    kept = _cache_precisions(caches)
    folder = ComparisonFolder(output, model)
    folder.check(model, [recipe.name for recipe in chosen], [other.row for other in others], fresh)
    checkpoint = open_original(model, progress=progress)
    given: dict[str, Any] = {"seed": seed, "threads": threads, "progress": progress}
    chosen, tokens_each = _settled(chosen, checkpoint, calibration, calibration_tokens, calibration_time, **given)
    if others and checkpoint.lasting_notes:
        raise UserError(f"{option('peers', '--peers')}: other tools start from unquantized checkpoints. Of "
                        f"{checkpoint.path}, {checkpoint.lasting_notes[0]}")  # fmt: skip
    usual = MeasurementSettings(
        tokens=tokens, window=window, threads=threads, seed=seed,
        speed_rounds=speed_rounds, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens)  # fmt: skip
    settings = _quick(usual) if quick else usual
    tools = (peer_time_limit, None if environments is None else Path(environments))
    with folder.locked():
        with english():  # what is measured goes to files
            inputs = prepare_inputs(checkpoint, folder.cache, texts=texts, choices=choices, settings=settings)
            hardware = probe(threads=thread_count(threads))
            for note in (*inputs.taken, *(f"warning: {warning}" for warning in hardware["warnings"])):
                progress.log(note)
            making = ArtifactRequest(
                checkpoint=checkpoint, model_sha256=checkpoint.sha256(progress), folder=folder.path, calibration=calibration,
                calibration_tokens=tokens_each or Calibration().tokens, memory=memory, fresh=fresh, **given)  # fmt: skip
            inputs.check_room(reference_key("reference", making.model_sha256, inputs, settings))
            measurement = _make_and_measure(making, chosen, others, tools, (engine, kept), inputs, settings, hardware)
            results = _results(making, measurement, inputs, hardware, scenario, _protocol(usual, settings, inputs))
            results = results.model_copy(update={"stacking": stacking_of(chosen, kept)})
            write_output(folder.results, (results.model_dump_json(indent=2) + "\n").encode())
        write_output(folder.report, render(results).encode())
    return results


def _chosen(recipes: Sequence[str | Path | Recipe], tokens: int | Literal["auto"] | None) -> list[Recipe]:
    """The recipes, none of which may write a file."""
    chosen = [chosen_recipe(recipe, None, tokens) for recipe in recipes]
    for recipe in chosen:
        refuse_files(recipe, "a comparison")
    return chosen


def _settled(
    recipes: list[Recipe],
    checkpoint: Checkpoint,
    calibration: Sequence[str | Path | Text],
    tokens: int | Literal["auto"] | None,
    seconds: float | None,
    **given: Any,
) -> tuple[list[Recipe], int | None]:
    """The recipes with a number of calibration tokens where one is to be found out, and that number or the given one."""
    if tokens != TEXT_AUTO and seconds is None:
        return recipes, tokens
    first = next((recipe for recipe in recipes if recipe.needs_calibration), chosen_recipe("balanced", None))
    found, _ = settled_recipe(first, checkpoint, calibration, tokens, seconds, device="cpu", cache=None, **given)
    count = found.calibration.tokens
    return [chosen_recipe(recipe, None, count) for recipe in recipes], count


def _results(
    making: ArtifactRequest,
    measurement: Measurement,
    inputs: Inputs,
    hardware: dict[str, Any],
    scenario: Scenario,
    protocol: Protocol,
) -> Results:
    return Results(
        metrics_version=METRICS_VERSION,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        quern_version=quern.__version__,
        model=_model(making.checkpoint, making.model_sha256),
        hardware=hardware,
        versions=_versions(),
        texts=list(inputs.sources),
        seed=making.seed,
        protocol=protocol,
        rows=measurement.rows,
        failures=measurement.failures,
        recommendation=recommend(measurement.rows, scenario),
    )


def _make_and_measure(
    making: ArtifactRequest,
    recipes: Sequence[Recipe],
    others: Sequence[PeerVariant],
    tools: tuple[float, Path | None],
    running: tuple[str, Sequence[CachePrecision]],
    inputs: Inputs,
    settings: MeasurementSettings,
    hardware: dict[str, Any],
) -> Measurement:
    """All artifacts, then all rows; failures of making and of measuring together. ``running``: engine and caches."""
    engine, caches = running
    made_by_us = [make_artifact(making, recipe, engine) for recipe in recipes]
    ours = [row for contender in made_by_us for row in _with_caches(contender, caches)]
    with temporary_folder("peers") as scratch:
        made, failures = make_all(making, Tools(scratch, *tools), others)
        launch = as_other_tools() if others else OURS
        reference = Contender(
            name="unquantized",
            path=making.checkpoint.path,
            sha256=making.model_sha256,
            launch=launch,
            notes=making.checkpoint.notes,
        )
        measurement = measure_all(
            [*_unquantized(making, reference, engine), *ours, *made],
            reference,
            inputs,
            settings=settings,
            hardware=hardware,
            progress=making.progress,
            cache=MeasuredCache(
                making.folder / "cache" / "measured",
                making.model_sha256,
                inputs,
                settings,
                hardware,
                fresh=making.fresh,
            ),
        )
    return replace(measurement, failures=[*failures, *measurement.failures])


def _quick(usual: MeasurementSettings) -> MeasurementSettings:
    return replace(
        usual,
        tokens=max(1, usual.tokens // QUICK_TOKENS),
        speed_rounds=min(usual.speed_rounds, QUICK_ROUNDS),
        decode_tokens=min(usual.decode_tokens, QUICK_DECODE),
    )


def _protocol(usual: MeasurementSettings, settings: MeasurementSettings, inputs: Inputs) -> Protocol:
    """What was measured. An interval's width goes with one over the square root of the number of tokens."""
    return Protocol(
        tokens=inputs.scored_tokens,
        prompt_tokens=len(inputs.prompt),
        decode_tokens=settings.decode_tokens,
        speed_rounds=settings.speed_rounds,
        threads=thread_count(settings.threads),
        quick=settings != usual,
        interval_factor=math.sqrt(usual.tokens / settings.tokens),
    )


def _unquantized(making: ArtifactRequest, reference: Contender, engine: str) -> list[Contender]:
    """The unquantized model once more, in the engine that quantized ones run in, where that is another."""
    fast = engine_for(open_model(making.checkpoint.path), engine)  # as it is run, which may not be as it is quantized
    if fast == reference.engine:
        return []
    return [replace(reference, name=f"unquantized ({fast})", engine=fast)]


def _cache_precisions(names: Sequence[str]) -> list[CachePrecision]:
    """The precisions called ``names``, each once. Raises ``UserError``."""
    found = [cache_named(name, "cpu") for name in dict.fromkeys(names)]
    return [precision for precision in found if precision is not None]


def _with_caches(contender: Contender, caches: Sequence[CachePrecision]) -> list[Contender]:
    """The contender with each of ``caches``; once as it is where there are none, and in an engine without the choice."""
    if not caches:
        return [contender]
    if contender.engine != "cpu":
        note = f"runs on the {contender.engine} engine, which keeps keys and values in its own way"
        return [replace(contender, notes=(*contender.notes, note))]
    return [
        replace(
            contender, cache=cache, name=contender.name if cache == ORDINARY else f"{contender.name} ({cache} cache)"
        )
        for cache in caches
    ]


def _check_distinct(names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not names or repeated:
        problem = f"{', '.join(repeated)} twice" if repeated else "none"
        where = f"{option('recipes', '--recipes')} and {option('peers', '--peers')}"
        raise UserError(f"{where}: every row once, at least one; got {problem}")


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
