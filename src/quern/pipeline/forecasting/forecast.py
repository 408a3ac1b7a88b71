"""``quern forecast``: what a recipe makes of a model, what that takes and how it runs, said before any work is done.

No weight of the model is read. What shapes decide is counted; for this machine the rest comes from short runs of the real
code on random weights of the model's widths, for another one from its hardware file.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import quern
from quern.advisor.forecasting import elsewhere
from quern.advisor.forecasting.elsewhere import Load
from quern.advisor.forecasting.machines import Machine, load_machine
from quern.advisor.forecasting.results import Forecast, ForecastMachine, RecipeForecast
from quern.advisor.hardware import this_processor
from quern.core.errors import UserError, option
from quern.core.machine.foreign_load import ForeignLoad
from quern.core.machine.memory import total_memory
from quern.core.machine.parallel import MOST_THREADS, thread_count
from quern.core.progress import Progress, Silent
from quern.core.recipe import Recipe
from quern.core.results import FOREIGN_LIMIT
from quern.core.text.units import processors_text
from quern.pipeline.forecasting.counted import Bytes, Case, bytes_of, case_of, disk_of, memory_of
from quern.pipeline.forecasting.here import told_here
from quern.pipeline.forecasting.short_decoding import PROMPT
from quern.pipeline.forecasting.subject import open_subject
from quern.pipeline.planning.budget import USUAL_CONTEXT
from quern.pipeline.request import chosen_recipe


def forecast(
    model: str | Path,
    *,
    recipes: Sequence[str | Path | Recipe] = ("balanced",),
    on: str | Path | None = None,
    context: int | None = None,
    format: str | None = None,
    calibration_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Foretell what each of ``recipes`` makes of ``model``, and what quantizing and running it takes.

    Args:
        model: A folder with weights, with ``synthetic.json`` or with a ``config.json`` alone; a GGUF file; a Hub id, of
            which only the small files are downloaded.
        recipes: Names of shipped recipes, files, or recipes; none with an allocation.
        on: Name of a shipped hardware file or the path of one; None: this machine, for which short runs are made.
        context: Tokens of text whose keys and values count to memory (default 4096, or what the model reads).
        format: In place of the recipes' own.
        calibration_tokens: In place of the recipes' own.
        threads: Of the short runs (default: all cores).
        progress: Told of the short runs.

    Raises:
        UserError: A recipe, machine or context that is not possible. ``BadFileError`` for damaged files.
    """
    progress, count = progress or Silent(), thread_count(threads)
    if not recipes:
        raise UserError(f"there is nothing to forecast: {option('recipes', '--recipe')} names no recipe")
    subject = open_subject(model, progress)
    most = int(subject.architecture.config.max_position_embeddings)
    length = context_of(context, most)
    cases = [case_of(subject, chosen_recipe(one, format, calibration_tokens)) for one in recipes]
    load = ForeignLoad()
    if on is None:
        told = told_here(subject, cases, length, most, count, progress)
        machine, warnings = _this_machine(count), _foreign(load.processors())
    else:
        name, file = load_machine(on)
        told = [_elsewhere(case, file, length, most, count) for case in cases]
        machine, warnings = _named(name, file), []
    return Forecast(
        quern_version=quern.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=str(model),
        architecture=subject.architecture.model_type,
        parameters=subject.checkpoint.parameters,
        bf16_bytes=subject.checkpoint.bf16_bytes,
        machine=machine,
        threads=count if on is None else file.cores,
        context=length,
        recipes=told,
        warnings=warnings,
    )


def context_of(context: int | None, most: int) -> int:
    """Tokens of text, the usual number where none is given. Raises ``UserError`` for more than the model reads."""
    if context is not None and not 1 <= context <= most:
        raise UserError(
            f"{option('context', '--context')} is {context}; it must be from 1 to the {most} tokens that the model reads"
        )
    return context or min(USUAL_CONTEXT, most)


def _elsewhere(case: Case, machine: Machine, context: int, most: int, threads: int) -> RecipeForecast:
    """One recipe on a machine that is not here."""
    size, runtime = bytes_of(case), runtime_on(case, machine)
    load = load_of(case, size, context, most)
    return RecipeForecast(
        recipe=case.recipe.name,
        format=case.recipe.format,
        runtime=runtime,
        artifact_bytes=size.files,
        bits_per_weight=8 * size.data / case.subject.checkpoint.parameters if size.data else None,
        quantize_seconds=elsewhere.seconds_of(machine, case.work, case.tokens),
        quantize_memory=memory_of(case, min(machine.cores, MOST_THREADS)),
        quantize_disk=disk_of(case, threads),
        run_memory=elsewhere.memory_of(runtime, load),
        prefill=elsewhere.prefill_of(runtime, machine, load),
        decode=elsewhere.decode_of(runtime, machine, load),
        contexts=elsewhere.contexts_of(runtime, machine, load),
        notes=[*case.subject.checkpoint.notes],
    )


def load_of(case: Case, size: Bytes, context: int, most: int) -> Load:
    """What running takes, counted; keys and values in the engine's usual precision first."""
    ordered = sorted(size.cache.items(), key=lambda pair: pair[0] != "float16")
    return Load(
        read=size.read,
        weights=int(size.files.value or sum(size.read.values())),
        operations=case.forward_operations,
        cache=dict(ordered),
        context=context,
        most=most,
        prompt=min(PROMPT, context),
    )


def runtime_on(case: Case, machine: Machine) -> str:
    """The runtime that the format is for, on that kind of machine."""
    if case.recipe.format == "gguf":
        return "llama.cpp"
    if machine.kind == "cuda" and case.recipe.format in ("compressed-tensors", "gptq", "awq"):
        return "vllm"
    return "quern"


def _this_machine(threads: int) -> ForecastMachine:
    found = this_processor()
    said = f"{found['cpu_model'] or 'a processor'}, {found['usable_cores']} cores, {found['kernels_in_use']} kernels"
    return ForecastMachine(name="this machine", kind="cpu", here=True, description=said, memory_bytes=total_memory())


def _named(name: str, machine: Machine) -> ForecastMachine:
    return ForecastMachine(
        name=name, kind=machine.kind, here=False, description=machine.description, memory_bytes=machine.memory.value
    )


def _foreign(load: float) -> list[str]:
    if load <= FOREIGN_LIMIT:
        return []
    return [
        f"other programs kept {processors_text(load)} busy during the short runs: what rests on them is as slow as that "
        "made them. Forecast again when nothing else runs"
    ]
