"""Short runs of the real quantization on random weights: what a recipe takes here, carried over to the whole model.

One block of the model's widths (or of proportions of them, where it has more than ``MOST_WEIGHTS``) and a few rows of
embedding and head are quantized with two numbers of calibration tokens. What grows with the tokens is carried over by the
operations that are counted for both models; of the rest, error feedback by its operations at the rate that passes reached,
and rounding by the number of weights.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
ROWS = 1024
"""Of the short embedding and head."""
TOKENS = (1024, 2048)
"""Of the two runs, about."""
HELD_OUT = 8
"""Sequences of the shorter run where a recipe holds some out, one of so many."""
clock: Callable[[], float] = time.perf_counter
"""What short runs are timed by."""
BLOCKS, OUTER_STEPS = "quantizing blocks", "token weights"


def _now() -> float:
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
    last: float = field(default_factory=_now)

    def advance(self, steps: float = 1) -> None:
        now = _now()
        self.steps.append(now - self.last)
        self.last = now

    def done(self) -> None:
        pass


@dataclass(frozen=True)
class Rates:
    """What the short runs found."""

    product: float
    """Operations/s of all that grows with the tokens, in the blocks; 0 where nothing does."""
    head: float
    """The same at the head."""
    weight: float
    """Seconds for each weight that is rounded in a block, error feedback apart."""
    weights: int
    """Of the block that was run."""
    divisor: int
    """By which widths were divided."""


@dataclass(frozen=True)
class _Run:
    """Seconds of one short quantization."""

    block: float
    token_weights: float
    """In the block, forward and backward."""
    head: float


def rates_of(case: Case, threads: int) -> Rates:
    """Quantize a block of random weights by the recipe, with two numbers of tokens."""
    config = dict(case.subject.checkpoint.config)
    divisor = 1
    while weights_of(_architecture(config, divisor)) > MOST_WEIGHTS and divisor < 64:
        divisor *= 2
    made = shrunk(config, layers=1, vocabulary=min(ROWS, int(config["vocab_size"])), divisor=divisor)
    with temporary_folder("forecast") as folder:
        model = write_random_checkpoint(folder / "model", made)
        length = _length(case)
        some = [max(1, tokens // length) * length for tokens in TOKENS]
        counts = tuple(some) if case.recipe.needs_calibration else (0,)
        recipes = [_short(case, tokens, length) for tokens in counts]
        _run(model, folder / "warm", recipes[0], threads)
        runs = [_run(model, folder / str(tokens), one, threads) for one, tokens in zip(recipes, counts, strict=True)]
        short = case_of(open_subject(model), recipes[0])
    return _solved(short, runs, counts, divisor)


def _architecture(config: dict[str, Any], divisor: int) -> Any:
    return architecture_of(shrunk(config, layers=1, vocabulary=512, divisor=divisor))


def _length(case: Case) -> int:
    """Of a sequence: as long as the recipe has it, for attention takes longer the longer it is."""
    roundings = [plan.rounding for plan in case.plan.quantized().values()]
    holds_out = any(one.target == "drift" or one.two_sided for one in roundings) or case.recipe.tuning is not None
    windows = [block.window for block in case.architecture.blocks if block.window]
    most = [int(case.architecture.config.max_position_embeddings), *windows]
    return min(case.recipe.calibration.sequence_length, *most, *([TOKENS[0] // HELD_OUT] if holds_out else []))


def _short(case: Case, tokens: int, length: int) -> Recipe:
    """The recipe with so many tokens, and the arithmetic that the whole model's size means."""
    dtype = case.recipe.calibration.compute_dtype
    if dtype == "auto":
        large = case.subject.checkpoint.parameters >= LARGE and not keeping(case.plan)
        dtype = "bfloat16" if large else "float32"
    settings = {"tokens": max(1, tokens), "sequence_length": length, "compute_dtype": dtype}
    calibration = case.recipe.calibration.model_copy(update=settings)
    overrides = tuple(one for one in case.recipe.overrides if _matches_first(case, one))
    changes = {"calibration": calibration, "overrides": overrides, "format": "quern"}
    return case.recipe.model_copy(update=changes)


def _matches_first(case: Case, override: Any) -> bool:
    return any(
        override.matches(case.architecture.block(0).prefix + one.name) for one in case.architecture.block(0).linears
    )


def _run(model: Path, output: Path, recipe: Recipe, threads: int) -> _Run:
    watch = Stopwatch()
    quantize(model, output, recipe=recipe, calibration=[_text()], threads=threads, progress=watch)
    steps = watch.seconds[OUTER_STEPS]  # of the one block forward, of the head, of the block backward
    passes, head = (steps[0] + steps[2], steps[1]) if len(steps) == 3 else (0.0, 0.0)
    return _Run(sum(watch.seconds[BLOCKS]), passes, head)


def _text() -> Text:
    """More than enough of it: every byte is a token."""
    letters = generator(0, "forecast").integers(33, 127, size=4 * max(TOKENS), dtype=np.uint8)
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
                for _ in range(2):
                    begin = _now()
                    round_linears({module: weight}, case.plan, GroupStatistics(), workers)
                    again = _now() - begin
                seconds.append(again)
    return sum(seconds) / len(seconds) / weight.numel() if seconds else 0.0


def _solved(short: Case, runs: Sequence[_Run], counts: Sequence[int], divisor: int) -> Rates:
    """Rates from the runs."""
    work, first, last = short.work, runs[0], runs[-1]
    between = counts[-1] - counts[0]
    product = head = 0.0
    fixed = last.block
    if between:
        grown = max((last.block + last.token_weights) - (first.block + first.token_weights), 1e-9)
        product = between * work.token_operations / grown
        fixed = max(0.0, last.block + last.token_weights - counts[-1] * work.token_operations / product)
        head = counts[-1] * work.head_operations / last.head if last.head else 0.0
    feedback = work.feedback_operations / product if product else 0.0
    weights = sum(work.weights.values())
    return Rates(
        product=product,
        head=head,
        weight=max(fixed - feedback, 0.1 * fixed) / max(1, weights),
        weights=weights_of(short.architecture),
        divisor=divisor,
    )


def drawing_rate(case: Case) -> float | None:
    """Bytes/s at which weights are drawn from a seed; None for weights that are not."""
    if not case.subject.drawn:
        return None
    source = case.subject.checkpoint.source
    assert isinstance(source, SyntheticSource)
    name = min(
        (n for n, one in source.infos.items() if one.elements >= 1 << 16), key=lambda n: source.infos[n].elements
    )
    begin = _now()
    tensor = source.read(name)
    return float(tensor.nbytes / (_now() - begin))
