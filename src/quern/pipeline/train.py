"""Training at the same bytes: an artifact in, one of the same format and size out whose predictions are nearer to the
unquantized model's. Resumable every few minutes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import quern
from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json
from quern.checkpoint.jobs.output_place import resolved
from quern.checkpoint.jobs.work_folder import WorkFolder, finish_removal
from quern.checkpoint.streaming.folder import forget_shards, streamed
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.core.artifact import PROVENANCE
from quern.core.errors import UserError, option
from quern.core.machine.heap import release_freed
from quern.core.machine.memory import forget_peak, peak_rss
from quern.core.machine.parallel import Workers, deterministic_workers, thread_count
from quern.core.plan import Plan
from quern.core.progress import Progress, Silent
from quern.core.recipe import Recipe, parse_recipe
from quern.core.text.suggest import did_you_mean
from quern.core.text.units import significant
from quern.formats.base import ArtifactWriter
from quern.formats.quern import METHOD
from quern.loading.fitting import open_original
from quern.loading.padding import padded
from quern.pipeline.blockwise.job import OnUnhealthy, plan_of
from quern.pipeline.output import Target, finished_layers, output_target, provenance_notes, publish
from quern.pipeline.quantize import quantize
from quern.pipeline.request import checked_writer, chosen_recipe, policy_named, refuse_files
from quern.pipeline.training import memory as memory_plan
from quern.pipeline.training.artifact import Start, check_trainable, linear_schemes, make_student
from quern.pipeline.training.result import write_artifact, write_metadata
from quern.pipeline.training.state import StateFiles
from quern.pipeline.training.teacher import Teacher
from quern.pipeline.training.text import TrainingText, check_calibration
from quern.quantization.arithmetic import arithmetic
from quern.quantization.training.loop import RATES, Data, History, Kind, Loop, Settings
from quern.quantization.training.model import Student
from quern.texts.source import Text

START = "start"
LARGE = 10**8
"""From so many parameters on, passes compute in bfloat16: several times as fast, and gradients have more noise than that."""
TOKENS, PASSES = 65536, 1
"""Of text, and how often it is gone through, unless said otherwise."""


@dataclass(frozen=True)
class TrainReport:
    """What ``train`` made."""

    path: Path
    recipe: Recipe
    train: str
    """``scales`` or ``codes``."""
    tokens: int
    """Of text, the held-out part included."""
    steps: int
    """That were made."""
    best_step: int
    """Whose state was written; 0: the state that training began with."""
    kl_before: float
    """Mean KL divergence to the unquantized model on the held-out part in nats a token, before training."""
    kl_after: float
    """The same of what was written."""
    bytes: int
    """All files of the artifact."""
    seconds: float | None
    """Wall-clock time of this run, quantization included; None for an artifact that was finished already."""
    peak_rss_bytes: int
    resumed: bool
    notes: list[str]


def train(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    artifact: str | Path | None = None,
    texts: Sequence[str | Path | Text] = (),
    train: Kind = "codes",
    tokens: int = TOKENS,
    passes: int = PASSES,
    learning_rate: float | None = None,
    memory: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    threads: int | None = None,
    on_unhealthy: OnUnhealthy = "stop",
    stream: bool = False,
    progress: Progress | None = None,
) -> TrainReport:
    """Train what ``recipe`` makes of ``model``, or the ``artifact`` that was made of it, into the new folder ``output``.

    ``train``: ``scales`` moves no code and trains factors of rows, norms, biases and tables; ``codes`` trains latent weights
    and the scales of the grid too. ``texts``: what to train on (default: as for calibration), ``tokens`` of them, one eighth
    held out, gone through ``passes`` times. ``learning_rate``: of numbers without a unit. ``memory``: cap of the resident
    set in bytes. ``on_unhealthy``, of the quantization, and ``stream``: see ``quantize``. An interrupted run continues where
    it stopped; the same arguments give the same bytes at any number of ``threads``. Raises ``UserError`` for requests that
    cannot be met and ``BadFileError`` for damaged input.
    """
    progress = progress or Silent()
    settings, policy = _settings(train, tokens, passes, learning_rate, seed), policy_named(on_unhealthy)
    if (recipe is None) == (artifact is None):
        both = f"{option('recipe', '--recipe')} and {option('artifact', '--from')}"
        raise UserError(f"training begins with what a recipe makes, or with an artifact: give one of {both}")
    target = output_target(output, model, fresh)
    output = Path(os.path.expanduser(output))
    original = open_original(streamed(model, progress) if stream else model, progress=progress)
    text = TrainingText(texts, usable_tokenizer(original.path, True), tokens)
    if artifact is not None and not Path(artifact).is_dir():
        raise UserError(
            f"{option('artifact', '--from')}: {artifact} is no folder. Give one that `quern quantize` wrote"
        )
    if artifact is not None and target.path == resolved(artifact):
        raise UserError(
            f"the output folder {target.path} is the artifact that training begins with. Choose another output"
        )
    given = None if artifact is None else _of_model(Start.open(Path(artifact)), original, progress)
    chosen = None if recipe is None else chosen_recipe(recipe, None)
    if chosen is not None:
        refuse_files(chosen, "training")
    begins_with = chosen if given is None else given.recipe
    assert begins_with is not None
    original = padded(original, begins_with.padding)
    asked = {
        "quern": quern.__version__,
        "model_sha256": original.sha256(progress),
        "recipe": begins_with.to_json(),
        "artifact_sha256": None if given is None else given.checkpoint.sha256(progress),
        "text_sha256": text.sha256,
        "tokens": tokens,
        **settings.to_json(),
    }
    if finished_layers(target, asked, fresh) is not None:
        finish_removal(target.work, target.path)
        return _report(output, None, True, ["was finished already", *provenance_notes(output)])
    request = _Request(original, text, settings, chosen, given, asked, target, memory, threads, progress, policy)
    started = time.perf_counter()
    forget_peak()
    resumed, notes = request.carry_out(texts, fresh)
    forget_shards(original)
    return _report(output, time.perf_counter() - started, resumed, notes)


def _settings(train: Kind, tokens: int, passes: int, learning_rate: float | None, seed: int) -> Settings:
    """The settings, if they make sense. Raises ``UserError``."""
    kinds = get_args(Kind)
    if train not in kinds:
        raise UserError(
            f"nothing to train is called {train!r}; there are {', '.join(kinds)}{did_you_mean(train, kinds)}"
        )
    counts = {option("tokens", "--tokens"): tokens, option("passes", "--passes"): passes}
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise UserError(f"{name} is {count!r}; it must be a whole number from 1 on")
    rate = RATES[train] if learning_rate is None else learning_rate
    if not math.isfinite(rate) or not 0 < rate < 1:
        named, usual = option("learning_rate", "--learning-rate"), f"{RATES[train]:g}"
        raise UserError(f"{named} is {rate!r}; it must lie between 0 and 1, as the usual {usual} does")
    return Settings(train, passes, rate, seed)


def _of_model(start: Start, original: Checkpoint, progress: Progress) -> Start:
    """``start``, if it was made of the model."""
    if start.provenance["fingerprint"].get("model_sha256") != original.sha256(progress):
        raise UserError(
            f"{start.checkpoint.path} was not made from {original.path}: its quern.json names other weights. Give the model "
            "that was quantized, whose predictions are what training aims at"
        )
    return start


@dataclass(frozen=True)
class _Request:
    """One job, and what it was asked."""

    original: Checkpoint
    text: TrainingText
    settings: Settings
    recipe: Recipe | None
    given: Start | None
    asked: dict[str, Any]
    target: Target
    memory: int | None
    threads: int | None
    progress: Progress
    on_unhealthy: OnUnhealthy

    def carry_out(self, texts: Sequence[str | Path | Text], fresh: bool) -> tuple[bool, list[str]]:
        """Whether an earlier run was continued, and notes."""
        architecture = architecture_of(self.original.config)
        sequences, heldout = self.text.drawn(architecture, self.settings.seed)
        if self.given is not None:
            self._check(self.given.plan, self.given.recipe, architecture, sequences)
        elif self.recipe is not None and self.recipe.allocation is None:
            self._check(plan_of(self.recipe, architecture), self.recipe, architecture, sequences)
        with WorkFolder.open(self.target.work, {**self.asked, **arithmetic()}, fresh, nested=START) as work:
            if work.finish_publishing() is not None:
                work.remove()
                return True, provenance_notes(self.target.path)
            resumed = work.done("started") is not None
            work.finish("started", [], {})
            start = self.given or self._quantized(work, texts, architecture)
            recipe = start.recipe
            if self.recipe is not None:
                recipe = recipe.model_copy(update={"format": self.recipe.format, "storage": self.recipe.storage})
            writer = self._check(start.plan, recipe, architecture, sequences)
            with deterministic_workers(self.threads) as workers:
                student, history = self._trained(work, start, sequences, heldout, workers)
                write_artifact(work, writer, start, student)
            notes = [*self.text.notes, *outcome(history)]
            training = {**self.settings.to_json(), "text_sha256": self.text.sha256, "tokens": sequences.numel(),
                        "heldout_tokens": heldout * sequences.shape[1], **described(history)}  # fmt: skip
            write_metadata(work, writer, start, self.original, self.asked, training, notes)
            publish(work, self.target, fresh)
        return resumed, [*start.provenance["notes"], *notes, *writer.notes()]

    def _check(self, plan: Plan, recipe: Recipe, architecture: Architecture, sequences: Tensor) -> ArtifactWriter:
        """The writer, if the plan can be trained within the cap and its format can store it."""
        schemes = linear_schemes(plan, architecture)
        check_trainable(schemes, self.settings.kind)
        threads = thread_count(self.threads)
        memory_plan.check(architecture, schemes, self.settings.kind, sequences.shape[1], threads, self.memory)
        return checked_writer(recipe, plan, architecture)

    def _quantized(self, work: WorkFolder, texts: Sequence[str | Path | Text], architecture: Architecture) -> Start:
        """What the recipe makes of the model, in the format that training reads."""
        assert self.recipe is not None
        recipe, seed = self.recipe.model_copy(update={"format": METHOD, "storage": "plain"}), self.settings.seed
        try:
            check_calibration(texts, recipe, self.original, architecture, seed)
            report = quantize(
                self.original.path,
                work.path(START),
                recipe=recipe,
                calibration=texts,
                memory=self.memory,
                seed=seed,
                threads=self.threads,
                on_unhealthy=self.on_unhealthy,
                progress=self.progress,
            )
        except UserError:
            if not any(work.path().glob(f"{START}*")):
                work.remove()  # or the next attempt, with other choices, would be told that this one is unfinished
            raise
        release_freed()
        return Start.open(report.path)

    def _trained(
        self, work: WorkFolder, start: Start, sequences: Tensor, heldout: int, workers: Workers
    ) -> tuple[Student | None, History]:
        """The student in its best state, or None where that is the one it began with."""
        dtype = torch.bfloat16 if self.original.parameters >= LARGE else torch.float32
        files = StateFiles(work)
        history = files.history()
        teacher = Teacher(self.original, start.architecture, sequences, dtype, work, workers)
        progress = work.telling(self.progress)
        teacher.run(progress)
        student = make_student(start, self.original, self.settings.kind, sequences.shape[1], dtype, workers)
        loop = Loop(student, Data(sequences, heldout, teacher.hidden), self.settings, workers, history)
        if history.heldout:
            loop.load_state(files.last())
        loop.run(files, progress)
        if history.best[0] == 0:
            return None, history
        loop.load_state(files.best())
        return student, history


def outcome(history: History) -> list[str]:
    """What should be known of how it went."""
    before, (step, after) = history.heldout[0][1], history.best
    notes = []
    if history.problem is not None:
        notes.append(f"training stopped: {history.problem}. The best state was kept; try a smaller learning rate")
    if step == 0:
        return [*notes, "training did not lower the held-out divergence, so nothing was changed"]
    return [
        *notes,
        f"trained: mean KL divergence on the held-out part of the training text {significant(before)} -> "
        f"{significant(after)} nats a token",
    ]


def described(history: History) -> dict[str, Any]:
    """What provenance says of it."""
    step, after = history.best
    return {
        "steps": history.step,
        "best_step": step,
        "kl_before": history.heldout[0][1],
        "kl_after": after,
        "heldout": [{"step": at, "kl": kl} for at, kl in history.heldout],
        "losses": history.losses,
        "problem": history.problem,
    }


def _report(output: Path, seconds: float | None, resumed: bool, notes: list[str]) -> TrainReport:
    """What lies in ``output`` now."""
    provenance = read_json(output / PROVENANCE)
    training = provenance["training"]
    return TrainReport(
        path=output,
        recipe=parse_recipe(provenance["fingerprint"]["recipe"], "of the artifact"),
        train=training["train"],
        tokens=training["tokens"],
        steps=training["steps"],
        best_step=training["best_step"],
        kl_before=training["kl_before"],
        kl_after=training["kl_after"],
        bytes=sum(path.stat().st_size for path in output.iterdir() if path.is_file()),
        seconds=seconds,
        peak_rss_bytes=peak_rss(),
        resumed=resumed,
        notes=list(dict.fromkeys(notes)),
    )
