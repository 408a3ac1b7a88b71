"""Short runs of the real quantization on random weights: what a recipe takes here, carried over to the whole model.

One block (of small ones some) of the model's widths (or of proportions of them, where it has more than ``MOST_WEIGHTS``)
and a few rows of embedding and head are quantized with two numbers of calibration tokens. The longer run has as many as the
recipe where that is a matter of seconds, so that what grows with the tokens is carried over little or not at all: by the
operations that are counted for both models, in the pass for token weights and in the blocks apart. Of the rest, error
feedback is carried over by its operations at the rate that the blocks reached, and rounding by the number of weights. What
is done once is timed as it is.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quern.architectures.base import architecture_of
from quern.checkpoint.synthetic import SyntheticSource
from quern.core.machine.parallel import deterministic_workers
from quern.core.machine.temporary import temporary_folder
from quern.core.machine.time_left import Work
from quern.core.progress import Task
from quern.core.recipe import Recipe
from quern.core.seeds import generator
from quern.pipeline.blockwise.job import LARGE, keeping
from quern.pipeline.forecasting.counted import Case, case_of
from quern.pipeline.forecasting.random_artifact import random_weight
from quern.pipeline.forecasting.shrunk import shrunk, weights_of, write_random_checkpoint
from quern.pipeline.forecasting.subject import open_subject
from quern.pipeline.quantize import quantize
from quern.quantization.block import round_linears
from quern.quantization.calibration.statistics import GroupStatistics
from quern.quantization.rounding.base import ROUNDINGS
from quern.texts.source import Text

MOST_WEIGHTS = 16_000_000
"""Of a block that is quantized as it is; larger ones are divided in width."""
FEW_WEIGHTS = 2_000_000
"""Of small blocks as many are run as have so many: the first one of a run takes longer."""
ROWS = 1024
"""Of the short embedding and head."""
LEAST_TOKENS, MOST_TOKENS = 1024, 8192
"""Of the longer run, unless the recipe has fewer."""
MOST_OPERATIONS = 6e11
"""That grow with the tokens, in the longer run: seconds of one processor."""
SHARE = 4
"""The shorter run has one token of so many."""
HELD_OUT = 8
"""Sequences of the shorter run where a recipe holds some out, one of so many."""
AGAIN = 3
"""Runs where there are no tokens, and times that rows are rounded; the middle one counts."""
DRAWING_S = 0.3
"""For which weights are drawn from their seed, at least."""
DRAWN = 7
"""Tensors, the largest of at most ``MOST_WEIGHTS``."""
APART = 3.0
"""By how much the rates of two kinds of passes over the same tokens may differ: beyond it is chance."""
clock: Callable[[], float] = time.perf_counter
"""What short runs are timed by."""
BLOCKS, OUTER_STEPS, CHECKS = "quantizing blocks", "token weights", "checking the weights"


def now() -> float:
    """Seconds of ``clock``."""
    return clock()


@dataclass
class Stopwatch:
    """Seconds between the steps of each task that is told of; a ``Progress``."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> Task:
        """Steps are timed from now on."""
        return _Timed(self.seconds[description])

    def log(self, message: str) -> None:
        """Nobody listens."""


@dataclass
class _Timed:
    steps: list[float]
    last: float = field(default_factory=now)

    def advance(self, steps: float = 1) -> None:
        moment = now()
        self.steps.append(moment - self.last)
        self.last = moment

    def done(self) -> None:
        pass


@dataclass(frozen=True)
class Rates:
    """What the short runs found."""

    blocks: float
    """Operations/s of what grows with the tokens while blocks are rounded; 0 where nothing does."""
    weighing: float
    """The same of the pass for token weights, in the blocks."""
    product: float
    """The same of both together."""
    head: float
    """The same at the head."""
    weight: float
    """Seconds for each weight that is rounded in a block, error feedback apart."""
    once: float
    """Seconds of what is done once, whatever the size of the model."""
    first: float
    """Seconds that the first run in a process takes longer."""
    checking: float
    """Seconds to look at a byte of weights before the start."""
    tokens: int
    """Of the longer run."""
    weights: int
    """Of the block that was run."""
    divisor: int
    """By which widths were divided."""


@dataclass(frozen=True)
class _Run:
    """Seconds of one short quantization."""

    block: float
    weighing: float
    """Token weights of the block, forward and backward."""
    head: float
    checking: float
    whole: float

    @property
    def rest(self) -> float:
        """What belongs to no task."""
        return self.whole - self.block - self.weighing - self.head - self.checking


def rates_of(case: Case, threads: int) -> Rates:
    """Quantize a block, or some, of random weights by the recipe, with two numbers of tokens."""
    config = dict(case.subject.checkpoint.config)
    divisor = 1
    while weights_of(_architecture(config, divisor)) > MOST_WEIGHTS and divisor < 64:
        divisor *= 2
    layers = min(case.architecture.layers, max(1, FEW_WEIGHTS // weights_of(_architecture(config, divisor))))
    made = shrunk(config, layers=layers, vocabulary=min(ROWS, int(config["vocab_size"])), divisor=divisor)
    with temporary_folder("forecast") as folder:
        model = write_random_checkpoint(folder / "model", made)
        counts, length = _counts(case, case_of(open_subject(model), _short(case, 1, 1, layers)).work.token_operations)
        recipes = [_short(case, tokens, length, layers) for tokens in counts]
        warm = _run(model, folder / "warm", recipes[0], threads)
        runs = [_run(model, folder / str(place), one, threads) for place, one in enumerate(recipes)]
        short = case_of(open_subject(model), recipes[0])
    return _solved(short, warm, runs, counts, divisor)


def _counts(case: Case, operations: float) -> tuple[list[int], int]:
    """Tokens of the runs and of a sequence, for a model that takes so many ``operations`` for each token.

    Sequences are as long as the recipe has them, for attention takes longer the longer they are; where some are held out,
    there have to be enough of them.
    """
    if not case.recipe.needs_calibration:
        return [0] * AGAIN, 1
    roundings = [plan.rounding for plan in case.plan.quantized().values()]
    holds_out = any(one.target == "drift" or one.two_sided for one in roundings) or case.recipe.tuning is not None
    windows = [block.window for block in case.architecture.blocks if block.window]
    length = min(
        case.recipe.calibration.sequence_length, int(case.architecture.config.max_position_embeddings), *windows
    )
    within = int(MOST_OPERATIONS / max(operations, 1.0))
    most = min(case.tokens, max(LEAST_TOKENS, min(within, MOST_TOKENS)))
    length = max(1, min(length, most // (2 * HELD_OUT) if holds_out else most))
    longer = max(1, most // length) * length
    shorter = max(longer // SHARE // length, HELD_OUT if holds_out else 1) * length
    return ([shorter, longer] if shorter < longer else [shorter, 2 * shorter]), length


def _architecture(config: dict[str, Any], divisor: int) -> Any:
    return architecture_of(shrunk(config, layers=1, vocabulary=512, divisor=divisor))


def _short(case: Case, tokens: int, length: int, layers: int) -> Recipe:
    """The recipe for the first ``layers`` blocks with so many tokens, in the arithmetic that the model's size means."""
    dtype = case.recipe.calibration.compute_dtype
    if dtype == "auto":
        large = case.subject.checkpoint.parameters >= LARGE and not keeping(case.plan)
        dtype = "bfloat16" if large else "float32"
    settings = {"tokens": max(1, tokens), "sequence_length": length, "compute_dtype": dtype}
    calibration = case.recipe.calibration.model_copy(update=settings)
    overrides = tuple(one for one in case.recipe.overrides if _matches(case, one, layers))
    changes = {"calibration": calibration, "overrides": overrides, "format": "quern"}
    return case.recipe.model_copy(update=changes)


def _matches(case: Case, override: Any, layers: int) -> bool:
    """Whether an override is for a linear of the first blocks."""
    blocks = (case.architecture.block(index) for index in range(layers))
    return any(override.matches(block.prefix + linear.name) for block in blocks for linear in block.linears)


def _run(model: Path, output: Path, recipe: Recipe, threads: int) -> _Run:
    watch = Stopwatch()
    begin = now()
    quantize(model, output, recipe=recipe, calibration=[_text()], threads=threads, progress=watch)
    whole = now() - begin
    steps = watch.seconds[OUTER_STEPS]  # of the blocks forward, of the head, of the blocks backward
    head = steps[len(steps) // 2] if steps else 0.0
    return _Run(sum(watch.seconds[BLOCKS]), sum(steps) - head, head, sum(watch.seconds[CHECKS]), whole)


def _seconds(work: Callable[[], object]) -> float:
    begin = now()
    work()
    return now() - begin


def _text() -> Text:
    """More than enough of it: every byte is a token."""
    letters = generator(0, "forecast").integers(33, 127, size=4 * MOST_TOKENS, dtype=np.uint8)
    return Text.of("forecast", [letters.tobytes().decode("ascii")])


def outer_rate(case: Case, threads: int) -> float:
    """Seconds for each weight of embedding and head, from a few of their rows; 0 where they are not rounded."""
    columns = int(case.architecture.config.hidden_size)
    weight = random_weight((ROWS, columns), torch.Generator().manual_seed(0))
    seconds = []
    with deterministic_workers(threads) as workers:
        for module in case.architecture.outer:
            plan = case.plan[module]
            if plan.quantized and not ROUNDINGS.get(plan.rounding.method).needs_hessian:
                rounding = partial(round_linears, {module: weight}, case.plan, GroupStatistics(), workers)
                times = [_seconds(rounding) for _ in range(1 + AGAIN)]
                seconds.append(statistics.median(times[1:]))
    return sum(seconds) / len(seconds) / weight.numel() if seconds else 0.0


def _solved(short: Case, warm: _Run, runs: Sequence[_Run], counts: Sequence[int], divisor: int) -> Rates:
    """Rates from the runs."""
    work, tokens = short.work, counts[-1]
    middle = statistics.median(run.block for run in runs)
    block, weighed = (runs[-1].block, runs[-1].weighing) if tokens else (middle, 0.0)
    weighing = tokens * work.weighing_operations / weighed if weighed else 0.0
    grows = work.token_operations - work.weighing_operations
    blocks = _block_rate(runs, counts, grows, weighing) if tokens and grows else 0.0
    grown = tokens * grows / blocks if blocks else 0.0
    feedback = work.feedback_operations / blocks if blocks else 0.0
    fixed = max(block - grown, 0.0)
    return Rates(
        blocks=blocks,
        weighing=weighing,
        product=tokens * work.token_operations / (grown + weighed) if grown + weighed else 0.0,
        head=tokens * work.head_operations / runs[-1].head if runs[-1].head else 0.0,
        weight=max(fixed - feedback, 0.1 * fixed) / max(1, work.weights.total()),
        once=max(0.0, statistics.median(run.rest for run in runs)),
        first=max(0.0, warm.whole - runs[0].whole),
        checking=statistics.median(run.checking for run in runs) / (2 * short.subject.checkpoint.parameters),
        tokens=tokens,
        weights=weights_of(short.architecture),
        divisor=divisor,
    )


def _block_rate(runs: Sequence[_Run], counts: Sequence[int], operations: float, weighing: float) -> float:
    """Operations/s of what grows with the tokens while a block is rounded: from what more tokens took.

    Where rounding takes much longer than that, the difference of two runs is chance; then the pass for token weights, which
    goes over the same tokens, says what is possible.
    """
    most = counts[-1] * operations / max(runs[-1].block, 1e-9)
    difference = runs[-1].block - runs[0].block
    found = (counts[-1] - counts[0]) * operations / difference if difference > 0 else float("inf")
    if weighing:
        found = min(max(found, weighing / APART), weighing * APART)
    return max(found, most)


def drawing_rate(case: Case) -> float | None:
    """Bytes/s at which weights are drawn from a seed; None for weights that are not."""
    if not case.subject.drawn:
        return None
    source = case.subject.checkpoint.source
    assert isinstance(source, SyntheticSource)
    names = sorted(source.infos, key=lambda name: source.infos[name].elements)
    some = [name for name in names if source.infos[name].elements <= MOST_WEIGHTS][-DRAWN:] or names[:1]
    source.read(some[0])  # tables are made once
    drawn, begin = 0, now()
    while now() - begin < DRAWING_S:
        for name in some:
            drawn += source.read(name).nbytes
    return drawn / (now() - begin)
