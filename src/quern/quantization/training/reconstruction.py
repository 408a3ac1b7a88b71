"""Tuning one rounded block until its outputs are those that it has in the unquantized model (block reconstruction).

With f(x_t) what the block makes of what it reads behind quantized ones, and y_t its output in the unquantized model,

    loss = sum_t w_t |f(x_t) - y_t|^2 / sum_t w_t |y_t|^2.

The first tokens of a text have outputs a thousand times as large as all others, and count for little: w_t, the squared norm
of the model's gradient at the block's output, says so. (BRECQ, Li et al. 2021, arXiv 2102.05426, reconstructs blocks,
weighted by gradients; EfficientQAT, Chen et al. 2024, arXiv 2407.11062, trains all weights and scales of a block.)

What is trained is what is stored (``codecs/trainable``), so that packing loses nothing. Sequences that are not trained on
judge; the state that is best for them is the result, and the block as it was rounded if none is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quern.codecs.base import Parts
from quern.codecs.trainable.base import LATENT
from quern.core.errors import UserError
from quern.core.machine.parallel import Workers, pieces
from quern.core.seeds import generator
from quern.quantization.training.adam import Adam
from quern.quantization.training.loop import ENCODE_STEPS, EVALUATIONS, GROWN, LATENT_RATE, Kind, rate_at
from quern.quantization.training.student import StudentBlock

BATCH = 2
"""Sequences of a step. Of few sequences many small steps come further than few large ones (docs/accuracy.md)."""
RATES: dict[Kind, float] = {"scales": 5e-4, "codes": 2e-3}
"""Of parameters without a unit, unless said otherwise; what is not rounded yet moves as ``codes`` do."""


@dataclass(frozen=True)
class Streams:
    """What a block reads and what it should make of it, by sequence."""

    inputs: Callable[[int], Tensor]
    """Behind quantized blocks, ``(time, width)``."""
    targets: Callable[[int], Tensor]
    """Its outputs in the unquantized model, ``(time, width)``."""
    weights: Tensor
    """How much each token counts, float32 ``(sequences, time)``."""
    held: Sequence[int]
    """Sequences that judge and are not trained on; at least one, and not all."""


@dataclass
class Tuned:
    """How it went, and the best state."""

    before: float
    """Loss on the sequences that judge, of the block as it was rounded."""
    after: float
    """The same of the best state; never more than ``before``."""
    steps: int = 0
    """That were made."""
    best_step: int = 0
    """After which the state was best; 0: as it was rounded."""
    problem: str | None = None
    """Why it ended before it was done."""
    parts: dict[str, Parts] = field(default_factory=dict)
    """Of the linears by name, in the best state; empty where that is the first."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Norms and biases by name, as they are stored."""


class Reconstruction:
    """A block in tuning."""

    def __init__(
        self, block: StudentBlock, streams: Streams, passes: int, learning_rate: float, seed: int, workers: Workers
    ) -> None:
        """``passes``: how often sequences are gone through; ``learning_rate``: of numbers without a unit, at its peak."""
        self.block, self.streams, self.workers = block, streams, workers
        held = set(streams.held)
        self._trained = [place for place in range(len(streams.weights)) if place not in held]
        self._batches = -(-len(self._trained) // BATCH)
        self.steps, self._peak, self._seed = passes * self._batches, learning_rate, seed
        modules = block.modules()
        self._adam = Adam(
            {f"{o}:{n}": p for o, module in modules.items() for n, p in module.named_parameters()}, workers
        )

    def run(self, advance: Callable[[], None]) -> Tuned:
        """All steps, since it is those at the end, with a falling rate, that gain most; ``advance`` is called after each.

        Raises ``UserError`` where the loss is no number before the first.
        """
        before = self._heldout()
        if not math.isfinite(before):
            raise UserError(
                f"block {self.block.spec.index}: the error of its outputs, by which tuning goes, is not finite: the model's "
                "values are so large that their squares overflow float32. Check the checkpoint, or leave out tuning"
            )
        found = Tuned(before, before)
        every = max(1, -(-self.steps // EVALUATIONS))
        while found.steps < self.steps:
            loss = self._step(found.steps)
            found.steps += 1
            advance()
            if not math.isfinite(loss):
                found.problem = f"in step {found.steps} the loss was no number"
                break
            if found.steps % every and found.steps < self.steps:
                continue
            now = self._heldout()
            if not math.isfinite(now) or now > GROWN * before:
                found.problem = f"after step {found.steps} the loss was {now:.3g}, and {before:.3g} before"
                break
            if now < found.after:
                found.after, found.best_step = now, found.steps
                found.parts = {name: weight.trainable.parts() for name, weight in self.block.weights.items()}
                found.vectors = {name: vector.stored() for name, vector in self.block.vectors.items()}
        return found

    def _batch(self, done: int) -> list[int]:
        """The sequences of the step after so many; each pass has an order of its own."""
        number, at = divmod(done, self._batches)
        order = generator(self._seed, "tuning order", self.block.spec.index, number).permutation(len(self._trained))
        return [self._trained[place] for place in order[at * BATCH : (at + 1) * BATCH]]

    def _step(self, done: int) -> float:
        """The step after so many; the loss of its sequences before it."""
        places = self._batch(done)
        targets = [self.streams.targets(place).float() for place in places]
        energy = sum(self._weighted(place, target) for place, target in zip(places, targets, strict=True)) or 1.0
        losses = [0.0] * len(places)

        def gradient(number: int, outputs: Tensor) -> Tensor:
            error = outputs.float() - targets[number]
            losses[number] = self._weighted(places[number], error)
            return error.mul_(self.streams.weights[places[number], :, None]).mul_(2 / energy)

        self.block.descend([self.streams.inputs(place) for place in places], gradient, self.workers)
        rate = rate_at(done + 1, self.steps, self._peak)
        self._adam.step(done + 1, lambda name: rate * (LATENT_RATE if name.endswith(LATENT) else 1.0))
        if (done + 1) % ENCODE_STEPS == 0 or done + 1 == self.steps:
            self.workers.map(lambda weight: weight.trainable.encode_again(), list(self.block.weights.values()))
        return sum(losses) / energy

    def _weighted(self, place: int, values: Tensor) -> float:
        """sum_t w_t |values_t|^2 of the sequence at a place; ``values`` float32 ``(time, width)``."""
        return float((values.square().sum(-1).double() * self.streams.weights[place]).sum())

    def _heldout(self) -> float:
        """The loss of the sequences that judge."""
        error, energy = 0.0, 0.0
        for start, stop in pieces(len(self.streams.held), self.workers.threads):
            places = self.streams.held[start:stop]
            found = self.block.outputs([self.streams.inputs(place) for place in places], self.workers)
            for place, outputs in zip(places, found, strict=True):
                target = self.streams.targets(place).float()
                error += self._weighted(place, outputs.float() - target)
                energy += self._weighted(place, target)
        return error / (energy or 1.0)
