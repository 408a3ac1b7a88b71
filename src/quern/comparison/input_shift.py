"""Whether a text's inputs to the linears of an artifact leave what calibration saw, where, and by how much.

The artifact runs on the reference engine, and what its linears read is sketched as it was when they were calibrated. A
difference counts in units of chance: of what halves of the calibration text (five tenths each) differ by, times
sqrt((1/m + 1/10) / (4/10)) for a text of m tenths. A longer text counts as one tenth all the same: texts differ, and more of
one does not make it less different. Of ten parts there are nine degrees of freedom, so a score is something where it exceeds
what Student's t does once in 100 texts like calibration's, in any difference of any linear (Bonferroni). Windows are cut as
calibration's text was, because inputs depend on how much text is before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json
from quern.core.artifact import PROVENANCE, CalibratedInputs, InputSummary
from quern.core.errors import BadFileError
from quern.core.machine.parallel import pieces
from quern.core.progress import Progress
from quern.core.results import GroupShift, InputShift
from quern.core.text.units import significant
from quern.engines.base import DtypeName
from quern.engines.reference import load
from quern.evaluation.texts import Window
from quern.loading.fitting import model_config
from quern.quantization.calibration.sketch import PARTS, RUNS, Sketches, differences

LEVEL = 0.01
"""Texts like calibration's in which some linear seems to be off."""
ADVICE = "quantize again with text of this kind (--calibration) and compare"


def calibrated_inputs(checkpoint: Checkpoint) -> CalibratedInputs | None:
    """What the artifact keeps of its calibration; None where it has nothing of it. Raises ``BadFileError``."""
    path = checkpoint.path / PROVENANCE
    if not path.is_file():
        return None
    found = read_json(path)
    kept = found.get("inputs") if isinstance(found, dict) else None
    if kept is None:
        return None
    try:
        seen = CalibratedInputs.model_validate(kept)
    except ValidationError as error:
        raise BadFileError(path, f"is not what quern writes: {error.errors()[0]['msg']}", "Quantize again") from None
    known = architecture_of(model_config(checkpoint)).linears
    strange = [name for group in seen.groups for name in group.linears if name not in known]
    if strange or any(len(group.profile) != RUNS for group in seen.groups):
        what = f"names a linear {strange[0][:80]!r}" if strange else f"has profiles that are not of {RUNS} runs"
        raise BadFileError(path, f"{what}, which this model has not", "Quantize again")
    return seen


def measured_shift(
    checkpoint: Checkpoint, windows: Sequence[Window], *, dtype: DtypeName, threads: int | None, progress: Progress
) -> InputShift | None:
    """How the inputs of the artifact's linears on ``windows`` differ from calibration's; None where it keeps nothing of it.

    Runs the artifact once on the reference engine.
    """
    seen = calibrated_inputs(checkpoint)
    if seen is None or not seen.groups:
        return None
    model = load(checkpoint.path, dtype=dtype, threads=threads).model
    found: dict[str, list[Sketches]] = {group.linears[0]: [] for group in seen.groups}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name].append(Sketches.of(inputs[0].reshape(-1, inputs[0].shape[-1])).summed())

        return hook

    for name in found:
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    tokens, length = sum(len(window.ids) for window in windows), seen.tokens // seen.sequences
    task = progress.task("inputs of linears", tokens)
    with torch.inference_mode():
        for window in windows:
            for start, stop in pieces(len(window.ids), length):
                model.base_model(torch.from_numpy(window.ids[start:stop])[None], use_cache=False)
                task.advance(stop - start)
    task.done()
    parts = min(1.0, PARTS * tokens / seen.tokens)
    chance = ((PARTS / parts + 1) / 4) ** 0.5
    groups = [compared(group, Sketches.joined(found[group.linears[0]]).summed(), chance) for group in seen.groups]
    groups.sort(key=lambda group: (-(group.score or 0.0), group.linears))
    tests = sum(2 for group in groups if group.score is not None)
    limit = student_limit(LEVEL / tests) if tests else None
    return InputShift(tokens=tokens, limit=limit, groups=groups)


def student_limit(level: float) -> float:
    """What |t| of ``PARTS`` - 1 = 9 degrees of freedom exceeds with probability ``level`` (Abramowitz, Stegun 26.7.3)."""
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        angle = math.atan(middle / math.sqrt(PARTS - 1))
        cosine, term, total = math.cos(angle), math.cos(angle), 0.0
        for step in range(2, PARTS - 1, 2):
            total += term
            term *= cosine * cosine * step / (step + 1)
        within = 2 / math.pi * (angle + math.sin(angle) * total)
        low, high = (middle, high) if 1 - within > level else (low, middle)
    return high


def compared(kept: InputSummary, found: Sketches, chance: float) -> GroupShift:
    """One sketch against calibration's; ``chance``: what halves differ by times this is what texts like it differ by."""
    reach, profile = torch.tensor([kept.reach]).double(), torch.tensor([kept.profile]).double()
    octaves, distance = differences(found.reach(), found.profile(), reach, profile)[0].tolist()
    score = None
    if kept.spread is not None:
        score = max(octaves / kept.spread[0], distance / kept.spread[1]) / chance
    return GroupShift(
        linears=list(kept.linears),
        reach_ratio=float(found.reach()) / kept.reach if kept.reach else 1.0,
        profile_distance=distance,
        beyond=float(found.beyond(kept.greatest)),
        clipped=None if kept.clip is None else float(found.beyond(kept.clip)),
        clipped_in_calibration=kept.clipped,
        score=score,
    )


def sentence(shift: InputShift) -> str | None:
    """What a reader has to know of the shift; None where there is nothing."""
    if not (off := shift.beyond_chance):
        return None
    worst = off[0]
    clipped = ""
    if worst.clipped is not None:
        clipped = f"; {significant(100 * worst.clipped, 2)} % of them are clipped"
    return (
        f"inputs of this text are not like those of calibration in {len(off)} of {len(shift.groups)} groups of linears, "
        f"most of all in {worst.linears[0]}, where 99.9 % of |x| reach {worst.reach_ratio:.2f} times as far and the "
        f"profile of their channels is {worst.profile_distance:.3f} away{clipped}: "
        f"{ADVICE}"
    )
