"""What is asked of a job, checked before any work is done: recipe, plan, writer, device, calibration tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

import quern
from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.codecs.base import CODECS, codec_of
from quern.core.errors import UserError, option
from quern.core.plan import Plan
from quern.core.progress import Progress
from quern.core.recipe import Recipe, load_recipe
from quern.core.recipe_parts import ROTATION, TEXT_AUTO
from quern.core.text.suggest import did_you_mean
from quern.formats.base import FORMATS, ArtifactWriter
from quern.observers.base import OBSERVERS
from quern.pipeline.blockwise import tuning
from quern.pipeline.blockwise.calibration_text import CalibrationText
from quern.pipeline.blockwise.job import OnUnhealthy, keeping
from quern.quantization.rounding.base import ROUNDINGS
from quern.quantization.transforms.base import TRANSFORMS


def chosen_recipe(
    recipe: str | Path | Recipe, format: str | None, calibration_tokens: int | Literal["auto"] | None = None
) -> Recipe:
    """The recipe, loaded if it is named, with another ``format`` and so many ``calibration_tokens`` where they are given.

    A recipe that needs no calibration stays as it is, and how many tokens ``auto`` means is found out elsewhere
    (``text_budget.py``).
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if format is not None:
        chosen = chosen.model_copy(update={"format": format})
    if calibration_tokens is None or calibration_tokens == TEXT_AUTO:
        return chosen
    if type(calibration_tokens) is not int or calibration_tokens < 1:
        named = option("calibration_tokens", "--calibration-tokens")
        raise UserError(f"{named} is {calibration_tokens!r}; it must be a whole number from 1 on, or {TEXT_AUTO}")
    if not chosen.needs_calibration:
        return chosen
    calibration = chosen.calibration.model_copy(update={"tokens": calibration_tokens})
    return chosen.model_copy(update={"calibration": calibration})


def refuse_files(recipe: Recipe, who: str) -> None:
    """Raise ``UserError`` for a recipe whose format is one file, or one that quern does not open, where ``who`` makes
    folders and runs what lies in them."""
    if not FORMATS.get(recipe.format).opened:
        raise UserError(
            f"{who} runs what it makes, and quern does not open format {recipe.format} of recipe {recipe.name!r}. Leave "
            f"format out; quern export writes {recipe.format}, with the same values"
        )
    if FORMATS.get(recipe.format).suffix is not None:
        raise UserError(
            f"{who} makes folders, and format {recipe.format} of recipe {recipe.name!r} is one file. Leave format out; "
            "quern export writes the file, with the same values"
        )


def checked_writer(recipe: Recipe, plan: Plan, architecture: Architecture) -> ArtifactWriter:
    """The writer, if every name in the recipe is known, some linear answers to each override, and the format can store the
    result."""
    for linear in plan.values():
        if linear.quantized:
            codec_of(linear.scheme)
        ROUNDINGS.get(linear.rounding.method)
        OBSERVERS.get(linear.activations.observer)
    ROUNDINGS.get(recipe.rounding.method)
    OBSERVERS.get(recipe.activations.observer)
    for settings in recipe.transforms:
        TRANSFORMS.get(settings.method)(settings)
    unused = [o.pattern for o in recipe.overrides if not o.matches_any(architecture.linears)]
    if unused:
        raise UserError(
            f"recipe {recipe.name!r}: no linear matches {' or '.join(map(repr, unused))}; names look like "
            f"{next(iter(architecture.linears))}"
        )
    _check_kept(recipe, plan)
    tuning.check(recipe, plan, architecture.linears)
    writer = FORMATS.get(recipe.format).writer(recipe, plan, architecture)
    writer.check()
    return writer


def _check_kept(recipe: Recipe, plan: Plan) -> None:
    """Raise ``UserError`` where weights are to keep their values and something else in the recipe speaks against it."""
    scaling = [transform.method for transform in recipe.transforms if transform.method != ROTATION]
    for name in keeping(plan):
        linear = plan[name]
        said = f"rounding {linear.rounding.method} keeps the values that weights have ({name})"
        changes = scaling[:1] or ([] if linear.rotation is None else [ROTATION])
        if changes:
            raise UserError(f"{said}, and transform {changes[0]} would change them. Leave out one of the two")
        if not codec_of(linear.scheme).takes_values:
            able = ", ".join(known for known in CODECS.names() if CODECS.get(known).takes_values)
            raise UserError(
                f"{said}, and codec {linear.scheme.codec} cannot find its codes for given values. Use a codec that can "
                f"({able}) or another rounding"
            )
        if recipe.calibration.compute_dtype == "bfloat16":
            raise UserError(
                f"{said}, and compute_dtype: bfloat16 works on copies of them that are rounded to it. Set calibration: "
                "{compute_dtype: float32}, or leave it out"
            )


def fingerprint_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    text: CalibrationText | None,
    seed: int,
    device: str,
    progress: Progress,
    format_options: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What was asked for: everything that the bytes of the artifact depend on, the arithmetic apart.

    A work folder holds the job to that as well (``quantization/arithmetic.py``); a finished artifact is what was asked for
    wherever it was made.
    """
    return {
        "quern": quern.__version__,
        "model_sha256": checkpoint.sha256(progress),
        "recipe": recipe.to_json(),
        "calibration_sha256": None if text is None else text.sha256,
        "seed": seed,
        "device": device,
        **({"format_options": dict(format_options)} if format_options else {}),
    }


def device_named(name: str) -> torch.device:
    """``cpu``, or ``cuda`` where torch has it. Raises ``UserError``."""
    if name not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; known: cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        instead = option("device='cpu'", "--device cpu")
        raise UserError(f"the device cuda was asked for, but torch sees no CUDA device here. Use {instead}")
    return torch.device(name)


def policy_named(name: str) -> OnUnhealthy:
    """What becomes of unhealthy blocks. Raises ``UserError``."""
    known = get_args(OnUnhealthy)
    if name not in known:
        named = option("on_unhealthy", "--on-unhealthy")
        raise UserError(f"{named} is {name!r}; it must be one of {', '.join(known)}{did_you_mean(name, known)}")
    return cast(OnUnhealthy, name)


def calibration_sequences(
    architecture: Architecture, text: CalibrationText | None, seed: int, or_fewer: bool = False
) -> Tensor | None:
    """Calibration tokens int64 ``(sequences, time)``; None without ``text``."""
    if text is None:
        return None
    config = architecture.config
    context = config.max_position_embeddings
    windows = filter(None, (block.window for block in architecture.blocks))
    context = min([context, *windows])  # within one window attention is plainly causal
    return text.sequences(context, config.vocab_size, seed, or_fewer)


def cache_folder() -> Path:
    """``quern/planning`` in the user's cache folder (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quern" / "planning"
