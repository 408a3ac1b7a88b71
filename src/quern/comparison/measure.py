"""Measure contenders side by side, each one in a process of its own.

Reference logits are the unquantized model's with float32 activations. The unquantized model as it is stored, measured
against them like every contender, gives the noise floor. Timed rounds of the contenders of a group alternate; a group is
what fits in memory together. The unquantized model runs in every group, so that what the machine did meanwhile shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from quern.comparison.artifact_size import ArtifactSize, stored_checkpoint, stored_folder
from quern.comparison.groups import Group, Loaded, alternate_rounds, score_all
from quern.comparison.inputs import Inputs, MeasurementSettings, reference_key
from quern.comparison.measured_cache import MeasuredCache
from quern.comparison.row_builder import Contender, Machine, Measured, Original, original_of, row_of
from quern.comparison.worker_process import Worker
from quern.core.errors import QuernError, UserError
from quern.core.machine.memory import free_memory
from quern.core.machine.parallel import available_threads
from quern.core.progress import Progress, Silent
from quern.core.results import DRIFT_LIMIT, Failure, Row
from quern.evaluation.reference_cache import ReferenceKey, has_reference
from quern.loading.fitting import open_any

LOADED_BYTES = 1 << 30
"""What a process needs beside its weights: interpreter, libraries, activations and a batch of logits."""
MOST_TOGETHER = 8
"""Contenders of one group: a run that is interrupted has lost one group's work."""


@dataclass(frozen=True)
class Measurement:
    """Rows in the order of the contenders, and the other tools' rows that could not be measured."""

    rows: list[Row]
    failures: list[Failure]


def measure_all(
    contenders: Sequence[Contender],
    reference: Contender | None,
    inputs: Inputs,
    *,
    settings: MeasurementSettings,
    hardware: dict[str, Any] | None = None,
    progress: Progress | None = None,
    cache: MeasuredCache | None = None,
) -> Measurement:
    """Measure ``reference`` (the unquantized model, or None) and ``contenders``; their rows in this order.

    ``hardware`` is what ``probe`` returned, for the fractions of its limits. ``cache`` remembers what was measured in an
    earlier, interrupted run. Raises ``UserError``, and ``WorkerError`` for a process of quern's own that failed; other
    tools that fail become failures.
    """
    progress = progress or Silent()
    everyone = [*([] if reference is None else [reference]), *contenders]
    stored, failures = _open_all(everyone, progress)
    everyone = [contender for contender in everyone if contender.name in stored]
    if reference is not None:
        _check_vocabularies(everyone, stored)
    original = original_of(open_any(everyone[0].path))
    key = (
        None if reference is None else reference_key(reference.engine, stored[reference.name].sha256, inputs, settings)
    )
    if key is not None:
        inputs.check_room(key)
    machine = Machine.of(hardware, settings.threads or available_threads())
    measured = _Run(inputs, key, settings, machine, progress, stored, failures, cache).measure(everyone, original)
    unquantized = None if reference is None else measured.get(reference.name)
    rows = [
        row_of(
            _with_origin_noted(contender, None if reference is None else stored[reference.name].sha256),
            measured[contender.name],
            unquantized,
            stored=stored[contender.name],
            original=original,
            dtype=settings.dtype,
            seed=settings.seed,
        )
        for contender in everyone
        if contender.name in measured
    ]
    return Measurement(rows, failures)


def _open_all(everyone: Sequence[Contender], progress: Progress) -> tuple[dict[str, ArtifactSize], list[Failure]]:
    stored: dict[str, ArtifactSize] = {}
    failures: list[Failure] = []
    for contender in everyone:
        if contender.kind != "peer":
            stored[contender.name] = stored_checkpoint(contender.path, contender.sha256, progress)
            continue
        try:
            stored[contender.name] = stored_folder(Path(contender.path), contender.sha256)
        except QuernError as error:
            failures.append(failure(contender, "load", error))
    return stored, failures


def failure(contender: Contender, stage: Any, error: QuernError) -> Failure:
    """What becomes of another tool's row."""
    assert contender.tool is not None
    return Failure(name=contender.name, tool=contender.tool.name, stage=stage, reason=str(error))


def _check_vocabularies(everyone: Sequence[Contender], stored: Mapping[str, ArtifactSize]) -> None:
    first = stored[everyone[0].name].vocabulary
    for contender in everyone:
        size = stored[contender.name].vocabulary
        if contender.kind != "peer" and size != first:
            raise UserError(
                f"{contender.name} has a vocabulary of {size} tokens, its reference one of {first}: they are not "
                "versions of one model. Give the checkpoint that it was made from as the reference"
            )


def _with_origin_noted(contender: Contender, reference_sha256: str | None) -> Contender:
    if reference_sha256 is None or contender.original_sha256 in (None, reference_sha256):
        return contender
    note = (
        "quantized from another checkpoint than the reference, as its quern.json says: the loss holds that difference"
    )
    return replace(contender, notes=(*contender.notes, note))


@dataclass
class _Run:
    inputs: Inputs
    key: ReferenceKey | None
    settings: MeasurementSettings
    machine: Machine
    progress: Progress
    stored: Mapping[str, ArtifactSize]
    failures: list[Failure]
    cache: MeasuredCache | None
    anchor_speed: float | None = field(default=None)
    """Tokens/s of the unquantized model in the first group."""

    def measure(self, everyone: Sequence[Contender], original: Original) -> dict[str, Measured]:
        """By name; what the cache knows is not measured again."""
        found = self._remembered(everyone)
        left = [contender for contender in everyone if contender.name not in found]
        groups = self._groups(left, original)
        missing = self.key is not None and not has_reference(self.inputs.folder, self.key)
        whole = len(groups) == 1 and len(groups[0]) == len(left)
        reference = everyone[0]
        if missing and left and not (whole and self._fits(left, original, with_reference=True)):
            self._compute_reference(reference)
            missing = False
        anchor = _anchor(everyone)
        for number, members in enumerate(groups):
            accompanied = self._fits([*members, anchor or members[0]], original)
            extra = [anchor] if anchor is not None and anchor not in members and accompanied else []
            first_needs = missing and number == 0
            meanwhile = partial(self._compute_reference, reference) if first_needs else lambda: None
            measured = self._measure_group(members, extra, meanwhile)
            drift = self._drift(measured, anchor)
            for contender in members:
                if contender.name in measured:
                    notes = _group_notes(len(members) == 1 < len(left) and not accompanied, drift)
                    found[contender.name] = self._keep(contender, measured[contender.name], drift, notes)
        return found

    def _remembered(self, everyone: Sequence[Contender]) -> dict[str, Measured]:
        if self.cache is None:
            return {}
        pairs = ((c.name, self.cache.load(c, self.stored[c.name].sha256)) for c in everyone)
        found = {name: measured for name, measured in pairs if measured is not None}
        anchor = _anchor(everyone)
        if anchor is not None and anchor.name in found:
            self.anchor_speed = found[anchor.name].decode_speed
        return found

    def _keep(self, contender: Contender, measured: Measured, drift: float | None, notes: tuple[str, ...]) -> Measured:
        whole = (*measured.notes, *notes)
        measured = replace(measured, machine=self.machine, group_speed=drift, notes=whole)
        if self.cache is not None:
            self.cache.save(contender, self.stored[contender.name].sha256, measured)
        return measured

    def _groups(self, left: Sequence[Contender], original: Original) -> list[list[Contender]]:
        groups: list[list[Contender]] = []
        for contender in left:
            grown = [*groups[-1], contender] if groups else []
            if grown and len(grown) <= MOST_TOGETHER and self._fits(grown, original):
                groups[-1].append(contender)
            else:
                groups.append([contender])
        return groups

    def _fits(self, contenders: Sequence[Contender], original: Original, with_reference: bool = False) -> bool:
        """Whether these can be in memory together. Other tools may unpack their weights, so they count in full."""
        needed = sum(
            (self.stored[c.name].loaded_bytes if c.kind != "peer" else 2 * original.parameters) + LOADED_BYTES
            for c in contenders
        )
        if with_reference:
            needed += 4 * original.parameters + LOADED_BYTES
        return fits_in_memory(needed)

    def _drift(self, measured: Mapping[str, Measured], anchor: Contender | None) -> float | None:
        """Speed of the unquantized model in this group over that in the first one."""
        decode = measured[anchor.name].decode_speed if anchor is not None and anchor.name in measured else None
        if decode is None:
            return None
        self.anchor_speed = self.anchor_speed or decode
        return decode / self.anchor_speed

    def _measure_group(
        self, members: Sequence[Contender], extra: Sequence[Contender], meanwhile: Callable[[], None]
    ) -> dict[str, Measured]:
        """Speed first, while nothing else runs; then each one's peak memory, before scoring adds its own."""
        with ExitStack() as stack:
            started = [(c, stack.enter_context(Worker(c.name, c.launch))) for c in (*members, *extra)]
            group = Group(
                [Loaded(contender, worker, scored=contender not in extra) for contender, worker in started],
                self.inputs,
                self.settings,
                self.progress,
                self.failures,
            )
            group.load(self.stored, meanwhile)
            alternate_rounds(group)
            group.read_memory()
            score_all(group, self._cache_fields())
            return {member.contender.name: member.measured() for member in group.members}

    def _compute_reference(self, reference: Contender) -> None:
        task = self.progress.task("reference logits", self.inputs.scored_tokens)
        with Worker("reference in float32", reference.launch) as worker:
            path = str(self.stored[reference.name].path)
            load = {"do": "load", "engine": reference.engine, "path": path, "dtype": "float32"}
            worker.ask({**load, "threads": self.settings.threads})
            worker.ask({"do": "reference", "windows": str(self.inputs.windows), **self._cache_fields()}, task.advance)
        task.done()

    def _cache_fields(self) -> dict[str, Any]:
        """Where the reference logits are, as requests name it."""
        if self.key is None:
            return {"cache": None, "key": None}
        return {"cache": str(self.inputs.folder), "key": self.key.to_json()}


def _group_notes(alone: bool, drift: float | None) -> tuple[str, ...]:
    notes = []
    if alone:
        notes.append("measured alone: it does not fit in memory together with another")
    if drift is not None and abs(drift - 1) > DRIFT_LIMIT:
        notes.append(
            f"while it was timed, the unquantized model decoded at {drift:.2f} of its speed in the first group"
        )
    return tuple(notes)


def _anchor(everyone: Sequence[Contender]) -> Contender | None:
    """The unquantized model, in another engine than the reference's where it is among the contenders."""
    unquantized = [contender for contender in everyone if contender.kind == "unquantized" and contender.timed]
    return unquantized[-1] if unquantized else None


def fits_in_memory(needed: int) -> bool:
    """Whether so many bytes are free."""
    return needed <= free_memory()
