"""Which machine runs a model, with which recipe and runtime: forecasts of machines that need not be here, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quern.advisor.forecasting import elsewhere
from quern.advisor.forecasting.elsewhere import Load
from quern.advisor.forecasting.losses import losses
from quern.advisor.forecasting.machines import Machine, load_machine, machine_names
from quern.advisor.forecasting.results import Placed, Placements
from quern.advisor.recommend import weights_of
from quern.advisor.scoring import Weights
from quern.core.errors import UserError
from quern.core.progress import Progress
from quern.core.recipe import Recipe
from quern.core.results import FORMER_SCENARIOS, Scenario, Target
from quern.core.scheme import parse_scheme
from quern.core.text.units import bytes_text, percent_text, significant
from quern.pipeline.forecasting.counted import Case, bytes_of, case_of
from quern.pipeline.forecasting.forecast import context_of, load_of
from quern.pipeline.forecasting.subject import open_subject
from quern.pipeline.request import chosen_recipe

RUNTIME_OF: dict[str, Target] = {"quern": "quern", "gguf": "llama.cpp", "compressed-tensors": "vllm"}
CANDIDATES = {
    "quern": ("compact", "balanced", "fast", "rtn4"),
    "gguf": ("q8_0", "q4_k_m", "q4_0", "iq3_s", "iq2_s"),
    "compressed-tensors": ("fast", "float8", "nvfp4", "rtn4"),
}
"""By format: the shipped recipes that are looked at. What a format cannot store of a model is left out."""
RUNS_ON = {"quern": ("cpu",), "llama.cpp": ("cpu", "cuda", "metal"), "vllm": ("cuda",)}
"""Kinds of machines that a runtime's figures are for."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a place."""

    weights: Weights
    min_speed: float | None
    max_size: int | None
    target: Target | None


def place(
    model: str | Path,
    *,
    hardware: Sequence[str | Path] = (),
    scenario: Scenario = "overall",
    weights: Mapping[str, float] | None = None,
    context: int | None = None,
    min_speed: float | None = None,
    max_size: int | None = None,
    target: Target | None = None,
    progress: Progress | None = None,
) -> Placements:
    """Which of some machines runs ``model``, with which recipe and runtime; nothing is run and no weight is read.

    ``hardware``: hardware files by name or path (default: all that ship). ``scenario`` and ``weights`` are those of
    ``recommend``: halvings of size, doublings of decode speed, and what the recipe lost on the small model that
    ``Placements.losses_of`` names. Other arguments are limits. Raises ``UserError`` and ``BadFileError``.
    """
    scenario = FORMER_SCENARIOS.get(scenario, scenario)
    wanted = Wanted(weights_of(scenario, weights), min_speed, max_size, target)
    if min_speed is not None and not (math.isfinite(min_speed) and min_speed > 0):
        raise UserError(f"min speed (tokens/s) must be a finite number above 0; got {min_speed}")
    machines = [load_machine(name) for name in (hardware or machine_names())]
    subject = open_subject(model, progress)
    most = int(subject.architecture.config.max_position_embeddings)
    length = context_of(context, most)
    notes, rows = [*subject.checkpoint.notes], []
    for format, recipes in CANDIDATES.items():
        for recipe in recipes:
            try:
                case = case_of(subject, _in_format(recipe, format))
                size = bytes_of(case)
                load = load_of(case, size, length, most)
                bits = 8 * size.data / subject.checkpoint.parameters
                placed = [_placed(case, name, machine, wanted, load, bits) for name, machine in machines]
            except UserError as error:
                notes.append(f"{recipe} as {format} is left out: {error}")
                continue
            rows += [one for one in placed if one is not None]
    fitting = _scored([row for row in rows if row.fits], wanted.weights, subject.checkpoint.bf16_bytes)
    excluded = sorted((row for row in rows if not row.fits), key=lambda row: row.memory_bytes / row.memory_limit)
    return Placements(
        model=str(model),
        parameters=subject.checkpoint.parameters,
        bf16_bytes=subject.checkpoint.bf16_bytes,
        scenario=scenario,
        context=length,
        choice=fitting[0] if fitting else None,
        ranking=fitting,
        excluded=excluded,
        losses_of=losses().model,
        notes=notes,
    )


def _in_format(name: str, format: str) -> Recipe:
    """A shipped recipe in a format; vLLM's has embedding and head as the checkpoint has them."""
    recipe = chosen_recipe(name, format)
    if format != "compressed-tensors":
        return recipe
    return recipe.model_copy(
        update={"embedding": parse_scheme({"codec": "none"}), "head": parse_scheme({"codec": "none"})}
    )


def _placed(case: Case, name: str, machine: Machine, wanted: Wanted, load: Load, bits: float) -> Placed | None:
    """One recipe on one machine; None where its runtime is not for such a machine."""
    runtime = RUNTIME_OF[case.recipe.format]
    if machine.kind not in RUNS_ON[runtime]:
        return None
    memory = elsewhere.memory_of(runtime, load)
    decode, prefill = elsewhere.decode_of(runtime, machine, load), elsewhere.prefill_of(runtime, machine, load)
    needed = int(memory.value or 0)
    problem = _problem(needed, machine, decode.value, decode.derivation, load.weights, runtime, wanted)
    if problem is None and wanted.weights.loss > 0 and losses().kl(case.recipe.name) is None:
        problem = f"what {case.recipe.name} loses was measured on no model"
    return Placed(
        machine=name,
        kind=machine.kind,
        recipe=case.recipe.name,
        format=case.recipe.format,
        runtime=runtime,
        fits=problem is None,
        reason=problem or memory.derivation,
        score=None,
        artifact_bytes=load.weights,
        bits_per_weight=bits,
        memory_bytes=needed,
        memory_limit=machine.limit,
        prefill=prefill,
        decode=decode,
        kl_elsewhere=losses().kl(case.recipe.name),
    )


def _problem(
    needed: int, machine: Machine, decode: float | None, said: str, size: int, runtime: str, wanted: Wanted
) -> str | None:
    """The first reason why a place does not serve, with by how much."""
    if needed > machine.limit:
        over, limit = bytes_text(needed - machine.limit), bytes_text(machine.limit)
        return f"needs {bytes_text(needed)}, {over} more than the {limit} that a model may take there"
    if decode is None:
        return f"its speed is not known: {said}"
    if wanted.target is not None and runtime != wanted.target:
        return f"it is for {runtime}, and {wanted.target} was asked for"
    if wanted.max_size is not None and size > wanted.max_size:
        return f"{bytes_text(size)} are {bytes_text(size - wanted.max_size)} more than the size allowed"
    if wanted.min_speed is not None and decode < wanted.min_speed:
        below = percent_text(1 - decode / wanted.min_speed)
        return f"decodes {significant(decode)} tokens/s, {below} below the {significant(wanted.min_speed)} asked for"
    return None


def _scored(rows: Sequence[Placed], weights: Weights, bf16_bytes: int) -> list[Placed]:
    """Best first: halvings of bytes, doublings of speed against the slowest that fits, and halvings that a loss is worth."""
    slowest = min((row.decode.value or math.inf for row in rows), default=1.0)
    found = []
    for row in rows:
        size = math.log2(bf16_bytes / row.artifact_bytes)
        speed = math.log2((row.decode.value or slowest) / slowest)
        loss = losses().cost(row.recipe) or 0.0
        score = weights.size * size + weights.speed * speed - weights.loss * loss
        found.append(row.model_copy(update={"score": score}))
    return sorted(
        found, key=lambda row: (-round(row.score or 0.0, 6), -(row.decode.value or 0.0), row.machine, row.recipe)
    )
