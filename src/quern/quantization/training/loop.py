"""The steps of a training: batches in an order drawn by the seed, Adam with a rate that falls to zero, and from time to time
the divergence on sequences that are not trained on. The best state by that is the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from quern.codecs.trainable.base import LATENT
from quern.core.machine.parallel import Workers, pieces
from quern.core.progress import Progress
from quern.core.seeds import generator
from quern.core.text.units import significant
from quern.quantization.training.adam import Adam
from quern.quantization.training.model import Student

BATCH = 2
"""Sequences of a step."""
EVALUATIONS = 8
"""How often the held-out sequences are looked at, at most."""
PATIENCE = 3
"""Looks without a better one after which training ends."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises."""
ENCODE_STEPS = 8
"""Steps after which codes are found anew that are not at every step."""
GROWN = 2.0
"""Times the first held-out divergence at which training counts as diverged."""
Kind = Literal["scales", "codes"]
RATES: dict[Kind, float] = {"scales": 5e-4, "codes": 1e-3}
"""Of parameters without a unit."""
LATENT_RATE = 2.0
"""How many times that latent weights, which count in steps of their grid, move."""


@dataclass(frozen=True)
class Settings:
    """How to train."""

    kind: Kind
    passes: int
    learning_rate: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        """For fingerprints and provenance."""
        return {"train": self.kind, "passes": self.passes, "learning_rate": self.learning_rate, "seed": self.seed}


@dataclass
class History:
    """How far a training has got."""

    step: int = 0
    heldout: list[tuple[int, float]] = field(default_factory=list)
    """After so many steps: mean KL divergence on the held-out sequences in nats a token."""
    losses: list[float] = field(default_factory=list)
    """Of each step: mean divergence of its batch."""
    problem: str | None = None
    """Why training ended before it was done."""

    @property
    def best(self) -> tuple[int, float]:
        """Step and divergence of the best state."""
        return min(self.heldout, key=lambda entry: (entry[1], entry[0]))

    def to_json(self) -> dict[str, Any]:
        """What the constructor takes back."""
        return {"step": self.step, "heldout": self.heldout, "losses": self.losses, "problem": self.problem}


class Keeper(Protocol):
    """Where states are kept."""

    def keep(self, history: History, best: bool, state: Callable[[], dict[str, Tensor]]) -> None:
        """Write the state down if it is the ``best`` or time has come."""
        ...


@dataclass(frozen=True)
class Data:
    """Sequences with what the unquantized model makes of them."""

    ids: Tensor
    """int64 ``(sequences, time)``; the last ``heldout`` are not trained on."""
    heldout: int
    teacher: Callable[[int], Tensor]
    """Final hidden states ``(time, width)`` of a sequence."""

    @property
    def trained(self) -> int:
        """Sequences that are trained on."""
        return len(self.ids) - self.heldout

    def of(self, places: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Token ids and hidden states of some sequences."""
        return [self.ids[place] for place in places], [self.teacher(place) for place in places]


def rate_at(step: int, steps: int, peak: float) -> float:
    """The rate of the step called ``step``, from 1 on, of so many: it rises to ``peak``, then falls as a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return peak * step / warm
    done = (step - warm) / max(1, steps - warm + 1)
    return peak * (1 + math.cos(math.pi * done)) / 2


class Loop:
    """A student in training."""

    def __init__(self, student: Student, data: Data, settings: Settings, workers: Workers, history: History) -> None:
        self.student, self.data, self.settings, self.history = student, data, settings, history
        self.adam = Adam(student.parameters(), workers)
        self.batches = -(-data.trained // BATCH)
        self.steps = self.batches * settings.passes
        self._every = max(1, -(-self.steps // EVALUATIONS))
        self._order: tuple[int, list[int]] = (-1, [])

    def state(self) -> dict[str, Tensor]:
        """All that changes, by name."""
        return {**self.student.state(), **{f"adam {name}": t for name, t in self.adam.state().items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        self.adam.load_state({n.removeprefix("adam "): t for n, t in state.items() if n.startswith("adam ")})
        self.student.load_state({n: t for n, t in state.items() if not n.startswith("adam ")})

    def run(self, keeper: Keeper, progress: Progress) -> None:
        """All steps that are left; ``history`` says how it went."""
        history = self.history
        task = progress.task("training", self.steps, history.step)
        if not history.heldout:
            history.heldout.append((0, self.heldout_divergence()))
            keeper.keep(history, True, self.state)
        while history.step < self.steps and history.problem is None and not self._in_vain():
            self._step()
            task.advance()
            if history.problem is None and (history.step % self._every == 0 or history.step == self.steps):
                self._look(progress)
            keeper.keep(history, history.best[0] == history.step, self.state)
        task.done()

    def heldout_divergence(self) -> float:
        """Mean KL divergence on the held-out sequences, in nats a token."""
        total = 0.0
        for start, stop in pieces(self.data.heldout, BATCH):
            places = range(self.data.trained + start, self.data.trained + stop)
            total += sum(self.student.divergences(*self.data.of(places)))
        return total / (self.data.heldout * self.data.ids.shape[1])

    def _look(self, progress: Progress) -> None:
        history = self.history
        found = self.heldout_divergence()
        if not math.isfinite(found) or found > GROWN * history.heldout[0][1]:
            history.problem = f"after step {history.step} the held-out divergence was {found:.3g} nats a token"
            return
        history.heldout.append((history.step, found))
        recent = history.losses[-self._every :]
        progress.log(
            f"step {history.step} of {self.steps}: KL {significant(sum(recent) / len(recent))} on the training text, "
            f"{significant(found)} on the held-out part (before: {significant(history.heldout[0][1])})"
        )

    def _in_vain(self) -> bool:
        """Whether the last looks have found nothing better."""
        best, _ = self.history.best
        return sum(step > best for step, _ in self.history.heldout) >= PATIENCE

    def _batch(self, step: int) -> list[int]:
        number, at = divmod(step, self.batches)
        if self._order[0] != number:
            random = generator(self.settings.seed, "training order", number)
            self._order = number, random.permutation(self.data.trained).tolist()
        return self._order[1][at * BATCH : (at + 1) * BATCH]

    def _step(self) -> None:
        history = self.history
        loss = self.student.backward(*self.data.of(self._batch(history.step)))
        history.step += 1
        if not math.isfinite(loss):
            history.problem = f"in step {history.step} the divergence was no number"
            return
        history.losses.append(loss)
        rate = rate_at(history.step, self.steps, self.settings.learning_rate)
        self.adam.step(history.step, lambda name: rate * (LATENT_RATE if name.endswith(LATENT) else 1.0))
        if history.step % ENCODE_STEPS == 0 or history.step == self.steps:
            self.student.encode_again()
