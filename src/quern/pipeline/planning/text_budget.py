"""How much calibration text: so many tokens as still lower what rounding is expected to lose on text that is held out.

Some sequences are held out. The others go through the unquantized model in lots, each as large as all before it, and add to
the Hessians of some linears; these tell the loss of the held-out sequences (``quantization/expected_loss.py``) before
anything is rounded. When a lot lowers it by less than ``WORTH``, or text or time are used up, no more tokens are taken. The
answer is kept in the cache, so that an interrupted quantization continues with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json, write_json
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.core.errors import BadFileError, UserError, option
from quern.core.machine.parallel import Workers, deterministic_workers
from quern.core.progress import Progress
from quern.core.recipe import Recipe
from quern.core.recipe_parts import TEXT_AUTO, Rounding
from quern.core.seeds import generator
from quern.core.text.units import percent_text, seconds_text
from quern.loading.padding import padding_record
from quern.pipeline.blockwise import sensitivity
from quern.pipeline.blockwise.calibration_text import CalibrationText
from quern.pipeline.blockwise.job import Job, plan_of
from quern.pipeline.request import cache_folder, calibration_sequences, checked_writer, device_named, fingerprint_of
from quern.quantization.arithmetic import arithmetic
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.hessian import add_to_hessian, norm_weights
from quern.quantization.expected_loss import expected_loss
from quern.texts.source import Text

FIRST, MOST, HELD_OUT = 4096, 262_144, 8192
"""Tokens of the first lot, of all lots together, and of what is held out."""
WORTH = 0.02
"""Share of the expected loss by which twice the tokens have to lower it."""
PROBED_COLUMNS = 8192
"""Linears with more inputs are not looked at: their Hessians take the room of many others."""
PROBED_BYTES = 2 << 30
"""Of all Hessians and held-out inputs; where they would take more, fewer blocks are looked at."""


@dataclass(frozen=True)
class TextBudget:
    """What was found."""

    tokens: int
    """To calibrate on."""
    note: str
    """How the expected loss fell, and why no more were taken."""


def settled_recipe(
    recipe: Recipe,
    checkpoint: Checkpoint,
    calibration: Sequence[str | Path | Text],
    tokens: int | str | None,
    seconds: float | None,
    *,
    device: str,
    seed: int,
    threads: int | None,
    cache: str | Path | None,
    progress: Progress,
) -> tuple[Recipe, list[str]]:
    """``recipe`` with so many calibration tokens as are worth it, where ``tokens`` (``auto``) or ``seconds`` ask for that;
    and a note that says why.

    A recipe that needs no calibration stays as it is. Raises ``UserError`` where the text is too short.
    """
    if seconds is not None and type(tokens) is int:
        raise UserError(
            f"{option('calibration_time', '--calibration-time')} is for finding out how many tokens to calibrate on, and "
            f"{option('calibration_tokens', '--calibration-tokens')} says how many. Give one of the two"
        )
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise UserError(
            f"{option('calibration_time', '--calibration-time')} is {seconds!r}; it must be above 0 seconds"
        )
    if not recipe.needs_calibration or (seconds is None and tokens != TEXT_AUTO):
        return recipe, []
    cache = cache_folder() if cache is None else Path(cache)
    settings = recipe.calibration.model_copy(update={"tokens": MOST + HELD_OUT})
    text = CalibrationText(calibration, usable_tokenizer(checkpoint.path, True), settings)
    # What is rounded to does not matter, so all recipes that calibrate alike share the answer.
    probe = Recipe(name="text-budget", rounding=Rounding(method="gptq"), calibration=settings)
    depends = {**fingerprint_of(checkpoint, probe, text, seed, device, progress), **arithmetic(), "seconds": seconds}
    depends["recipe"] = settings.model_dump(mode="json") | padding_record(checkpoint)
    place = cache / f"text-budget-{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]}"
    answer = place.with_suffix(".json")
    if (found := _known(answer)) is None:
        found = _settled(probe, checkpoint, text, seconds, place, depends, device, seed, threads, progress)
        write_json(answer, vars(found))
    calibrated = recipe.calibration.model_copy(update={"tokens": found.tokens})
    return recipe.model_copy(update={"calibration": calibrated}), [found.note]


def _known(answer: Path) -> TextBudget | None:
    """What was found before; None where nothing was, or a damaged file says so: it is found again then."""
    with suppress(BadFileError):
        known = read_json(answer)
        tokens, note = known.get("tokens"), known.get("note")
        if type(tokens) is int and tokens > 0 and isinstance(note, str):
            return TextBudget(tokens, note)
    return None


def _settled(
    probe: Recipe,
    checkpoint: Checkpoint,
    text: CalibrationText,
    seconds: float | None,
    place: Path,
    depends: dict[str, Any],
    device: str,
    seed: int,
    threads: int | None,
    progress: Progress,
) -> TextBudget:
    architecture = architecture_of(checkpoint.config)
    sequences = calibration_sequences(architecture, text, seed, or_fewer=True)
    assert sequences is not None
    order = torch.from_numpy(generator(seed, "text budget").permutation(len(sequences)))
    sequences, length = sequences[order], sequences.shape[1]
    held = max(1, HELD_OUT // length)
    if len(sequences) < 3 * held:
        raise UserError(
            f"the calibration text has {sequences.numel()} tokens; to find out how many are worth it takes at least "
            f"{3 * held * length}. Give more text with {option('calibration', '--calibration')}, or a number of "
            f"{option('calibration_tokens', '--calibration-tokens')}"
        )
    plan, where = plan_of(probe, architecture), device_named(device)
    writer = checked_writer(probe, plan, architecture)
    with deterministic_workers(threads) as workers:

        def passed(lot: Tensor) -> Job:
            """The job of some sequences, whose token weights and inputs of the blocks looked at are there."""
            work = WorkFolder.open(place, depends, fresh=True)
            job = Job(checkpoint, architecture, probe, plan, writer, lot, seed, work, workers, progress, where)
            sensitivity.run(job, keep={linear.block for linear in linears})
            return job

        linears = _probed(architecture, held * length)
        with ending(passed(sequences[:held])) as job:
            _look(job, linears, hold_out=True)
        growth = _Growth(len(sequences) - held, length, seconds)
        while (lot := growth.next_lot()) is not None:
            with ending(passed(sequences[held:][lot])) as job:
                _look(job, linears)
            growth.add(sum(linear.expected_loss(probe.rounding.damping, workers) for linear in linears))
            progress.log(growth.said)
    return TextBudget(growth.settled, growth.said)


@contextmanager
def ending(job: Job) -> Iterator[Job]:
    """``job``, whose work folder is removed afterwards."""
    try:
        yield job
    finally:
        job.work.remove()


@dataclass
class _Probed:
    """A linear that is looked at."""

    block: int
    name: str
    """Relative to the block."""
    hessian: Tensor
    """Of the calibration sequences so far."""
    heldout: list[Tensor] = field(default_factory=list)
    """Inputs float32 ``(tokens, columns)``, each times the root of its token weight."""
    size: float = 0.0
    """Mean square of its weights, to which rounding errors are in proportion."""

    def expected_loss(self, damping: float, workers: Workers) -> float:
        """Of the held-out tokens, but for a factor that all linears share."""
        return self.size * expected_loss(self.hessian, torch.cat(self.heldout), damping, workers)


def _probed(architecture: Architecture, tokens: int) -> list[_Probed]:
    """Of some blocks, the middle one first and as far as there is room, one linear of each group that every token meets."""
    layers, room = architecture.layers, PROBED_BYTES
    found: list[_Probed] = []
    for index in dict.fromkeys((layers // 2, layers * 5 // 6, layers // 6)):
        spec = architecture.block(index)
        firsts = [spec.linear(group.linears[0]) for group in spec.groups]
        some = [one for one in firsts if one.expert is None and one.shape[1] <= PROBED_COLUMNS]
        room -= sum(4 * one.shape[1] * (one.shape[1] + tokens) for one in some)
        if room < 0 and found:
            break
        found += [_Probed(index, one.name, torch.zeros(one.shape[1], one.shape[1])) for one in some]
    return found


def _look(job: Job, linears: Sequence[_Probed], hold_out: bool = False) -> None:
    """Add the job's sequences to the Hessians of ``linears``, or hold them out."""
    assert job.sequences is not None
    settings, length = job.recipe.calibration, job.sequences.shape[1]
    for index in dict.fromkeys(linear.block for linear in linears):
        block = Block(job.architecture, index, job.read, job.compute_dtype, length)
        inputs, squares = job.activations(sensitivity.INPUTS, index), sensitivity.token_weights(job, index)
        own = [linear for linear in linears if linear.block == index]
        for start, stop in inputs.waves():
            # What a linear reads may be made by another one of them, so each gets a run of its own.
            waves = inputs.read(start, stop)
            for linear in own:
                seen = block.capture([linear.name], waves, job.workers)[linear.name].inputs.float().cpu()
                weights = squares[linear.name][start * length : stop * length]
                if hold_out:
                    linear.heldout.append(seen * weights.sqrt()[:, None])
                    linear.size = float(block.linear(linear.name).weight.float().square().mean())
                else:
                    if settings.token_weight != "fisher":
                        weights = norm_weights(seen) if settings.token_weight == "norm" else torch.ones(len(seen))
                    add_to_hessian(linear.hessian, seen, weights, job.workers)


@dataclass
class _Growth:
    """Lots of sequences, one after the other, until one more is not worth it."""

    available: int
    """Sequences."""
    length: int
    seconds: float | None
    taken: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    """By tokens."""
    settled: int = 0
    """Tokens, as far as is known."""
    said: str = ""
    started: float = field(default_factory=time.monotonic)
    stopped: str = ""
    """Why."""
    began: float = 0.0

    def next_lot(self) -> slice | None:
        """As many sequences as were taken so far; None when it is enough."""
        if self.stopped:
            return None
        wanted = self.taken or max(1, FIRST // self.length)
        spent, last = time.monotonic() - self.started, time.monotonic() - self.began
        if (self.taken + wanted) * self.length > MOST:
            self.stopped = f"{MOST} are the most"
        elif self.taken + wanted > self.available:
            self.stopped = "twice as many are not in the text"
        elif self.seconds is not None and self.taken and spent + 2 * last > self.seconds:
            self.stopped = f"twice as many would take more than {seconds_text(self.seconds)}"
        else:
            self.began, before = time.monotonic(), self.taken
            self.taken += wanted
            return slice(before, self.taken)
        self._say()
        return None

    def add(self, loss: float) -> None:
        """The expected loss after the sequences taken so far."""
        tokens, before = self.taken * self.length, self.losses.get(self.settled)
        self.losses[tokens] = loss
        if loss == 0:
            self.settled, self.stopped = tokens, "more cannot lower it"
        elif before is not None and loss > (1 - WORTH) * before:
            self.stopped = f"twice as many would lower it by {percent_text(max(0.0, 1 - loss / before))}"
        else:
            self.settled = tokens
        self._say()

    def _say(self) -> None:
        first = next(iter(self.losses.values()))
        # Of a model whose output is the same whatever it reads nothing is lost.
        course = ", ".join(f"{tokens} {loss / (first or 1.0):.3f}" for tokens, loss in self.losses.items())
        why = f"; {self.stopped}" if self.stopped else ""
        self.said = (
            f"calibration takes {self.settled} tokens. Expected loss on held-out text by tokens, of that of the "
            f"first: {course}{why}"
        )
