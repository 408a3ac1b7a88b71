"""From a target to one candidate for each matrix: limits in bytes, the solver, and what to say where nothing fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quern.core.allocation import Target
from quern.core.errors import UserError
from quern.core.plan import LinearPlan, rotation_for
from quern.core.recipe import Override, Recipe, parse_recipe
from quern.core.text.scheme_text import scheme_text
from quern.core.text.units import bytes_text, significant
from quern.pipeline.planning.sizes import ArtifactBytes, Sizes
from quern.quantization.allocation.candidate import Candidate, Limits, Option, Problem, totals
from quern.quantization.allocation.solver import Goal, solve

USUAL_CONTEXT = 4096
_TRIES = 8
"""How often the room for tensor data is corrected by what the other files turned out to take."""


@dataclass(frozen=True)
class Budget:
    """A target on one machine and model: its limits, each by its name, in the units in which it is given."""

    target: Target
    parameters: int
    cache: int = 0
    """Bytes of the key/value cache that counts towards ``memory``."""
    bandwidth: float | None = None
    """Bytes/s at which weights are read; for ``min_speed``."""

    def data(self, files: int) -> dict[str, int]:
        """By limit, the bytes of tensor data that it allows where all files that hold no tensor data take ``files``."""
        target = self.target
        found = {}
        if target.bits is not None:
            found["bits"] = int(target.bits * self.parameters / 8)
        if target.bytes is not None:
            found["bytes"] = target.bytes - files
        if target.memory is not None:
            found["memory"] = target.memory - self.cache - files
        return found

    @property
    def read(self) -> int | None:
        """Bytes that a token may read."""
        if self.target.min_speed is None:
            return None
        assert self.bandwidth is not None
        return int(self.bandwidth / self.target.min_speed)

    @property
    def goal(self) -> Goal:
        """What becomes least."""
        return "loss" if self.target.max_loss is None else "bytes"


@dataclass(frozen=True)
class Chosen:
    """The outcome: a recipe that says of each matrix what it becomes."""

    recipe: Recipe
    candidates: dict[str, Candidate]
    bytes: ArtifactBytes
    read: int
    """Bytes that a token reads."""
    loss: float
    limit: str | None = None
    """Name of the limit that the choice lies at; None: every matrix has the candidate that loses least."""
    smallest: int = 0
    """Bytes of the smallest artifact that the candidates allow."""


class Chooser:
    """Chooses for one model, whose matrices have ``candidates``, among the options ``problem``."""

    def __init__(
        self,
        recipe: Recipe,
        problem: Problem,
        candidates: Mapping[str, Sequence[Candidate]],
        sizes: Sizes,
        outer: Collection[str],
    ) -> None:
        self._recipe, self._problem, self._candidates = recipe, problem, candidates
        self._sizes, self._outer = sizes, tuple(outer)

    def choose(self, budget: Budget) -> Chosen:
        """The best choice within ``budget``. Raises ``UserError`` with what would do where there is none."""
        smallest = self.smallest(budget)
        kept = smallest.bytes.data - sum(one.bytes for one in smallest.candidates.values())
        files = _overhead(smallest)
        best: Chosen | None = None
        for _ in range(_TRIES):
            options = solve(self._problem, self._limits(budget, kept, files), budget.goal)
            if options is None:
                break
            found = self._carried_out(options, budget)
            fits, own = self._fits(budget, found), _overhead(found)
            if fits:
                again = best is not None and found.candidates == best.candidates
                best = found if best is None or self._better(found, best, budget) else best
                if again or own >= files:
                    break
            if budget.goal == "bytes":
                break
            files = own  # the other files' bytes depend a little on what is chosen
        if best is not None:
            return replace(best, smallest=smallest.bytes.files)
        raise self._contradiction(budget, kept, smallest)

    def smallest(self, budget: Budget) -> Chosen:
        """The choice of the fewest bytes. Raises ``UserError`` where even that is above one of the budget's sizes."""
        found = self._carried_out([min(o, key=lambda one: (one.bytes, one.loss)) for o in self._problem], budget)
        self._refuse_sizes(budget, found)
        return found

    def _better(self, one: Chosen, other: Chosen, budget: Budget) -> bool:
        if budget.goal == "bytes":
            return one.bytes.files < other.bytes.files
        return one.loss < other.loss

    def _limits(self, budget: Budget, kept: int, files: int) -> Limits:
        allowed = budget.data(files)
        read = budget.read
        return Limits(
            # Where bytes become least anyway, what they come to is compared with the limits afterwards.
            bytes=min(allowed.values()) - kept if allowed and budget.goal == "loss" else None,
            read=None if read is None else read - kept,
            loss=budget.target.max_loss,
        )

    def _fits(self, budget: Budget, found: Chosen) -> bool:
        allowed = budget.data(_overhead(found))
        return all(found.bytes.data <= most for most in allowed.values())

    def _carried_out(self, options: Sequence[Option], budget: Budget) -> Chosen:
        """The recipe of a choice, and all that is to be known of it."""
        candidates = {one.linear: one for option in options for one in option.candidates}
        recipe = decided(self._recipe, {name: one.plan for name, one in candidates.items()}, self._outer)
        size = self._sizes.of_artifact(recipe)
        unread = size.data - sum(one.bytes for one in candidates.values())
        sums = totals(options)
        best = all(one.loss <= min(o.loss for o in self._candidates[name]) for name, one in candidates.items())
        found = Chosen(recipe, candidates, size, sums.read + unread, sums.loss)
        return found if best else replace(found, limit=self._limit(budget, found))

    def _limit(self, budget: Budget, found: Chosen) -> str:
        """The limit of which the least share is left."""
        if budget.goal == "bytes":
            return "max_loss"
        left = {name: (most - found.bytes.data) / max(most, 1) for name, most in budget.data(_overhead(found)).items()}
        if budget.read is not None:
            left["min_speed"] = (budget.read - found.read) / max(budget.read, 1)
        return min(left, key=lambda name: left[name])

    def _refuse_sizes(self, budget: Budget, smallest: Chosen) -> None:
        """Raise ``UserError`` where even the smallest artifact is above one of the sizes."""
        size, target = smallest.bytes, budget.target
        bits = 8 * size.data / budget.parameters
        least = (
            f"the smallest artifact that the candidates of recipe {self._recipe.name!r} allow has {size.files:,} bytes "
            f"({bytes_text(size.files)}), {bits:.3f} bits per weight: {_kinds(smallest.candidates)}"
        )
        for name, most in budget.data(_overhead(smallest)).items():
            if size.data > most:
                cache = f" beside a key/value cache of {bytes_text(budget.cache)}" if name == "memory" else ""
                raise UserError(
                    f"{name} {_said(name, target)}{cache} cannot be met: {least}. Allow more, or give the recipe smaller "
                    "candidates"
                )
        if budget.read is not None and smallest.read > budget.read:
            assert budget.bandwidth is not None
            raise UserError(
                f"min_speed {target.min_speed:g} tokens/s cannot be met: {least}; read once a token at "
                f"{significant(budget.bandwidth / 1e9)} GB/s that gives "
                f"{significant(budget.bandwidth / smallest.read)} tokens/s. Ask for less, or give the recipe smaller "
                "candidates"
            )

    def _contradiction(self, budget: Budget, kept: int, smallest: Chosen) -> UserError:
        """Why no choice keeps both the loss and the sizes."""
        assert budget.target.max_loss is not None
        asked = f"max_loss {budget.target.max_loss:g}"
        least = sum(min(option.loss for option in group) for group in self._problem)
        if least > budget.target.max_loss:
            return UserError(
                f"{asked} cannot be met: with the candidate that loses least for each matrix the predicted loss is "
                f"{significant(least)} nats a token. Allow more, or give the recipe larger candidates"
            )
        limits = self._limits(budget, kept, _overhead(smallest))
        alone = solve(self._problem, Limits(loss=budget.target.max_loss), "bytes")
        needed = "" if alone is None else f"{bytes_text(self._carried_out(alone, budget).bytes.files)} at least"
        allowed = budget.data(_overhead(smallest))
        most = min(allowed.values()) - kept if allowed else None
        within = solve(self._problem, Limits(most, limits.read), "loss")
        reached = (
            "" if within is None else f"a predicted loss of {significant(totals(within).loss)} nats a token at least"
        )
        name = min(allowed, key=lambda key: allowed[key]) if allowed else "min_speed"
        if allowed and budget.read is not None and budget.read < min(allowed.values()):
            name = "min_speed"
        return UserError(
            f"{name} {_said(name, budget.target)} and {asked} contradict each other: the first allows {reached}, the second "
            f"takes {needed}. Relax one of them"
        )


def _overhead(found: Chosen) -> int:
    """Bytes that are no tensor data."""
    return found.bytes.files - found.bytes.data


def _said(name: str, target: Target) -> str:
    value = getattr(target, name)
    return bytes_text(value) if name in ("bytes", "memory") else f"{value:g}"


def _kinds(candidates: Mapping[str, Candidate]) -> str:
    kinds = Counter(scheme_text(one.plan.scheme) for one in candidates.values())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def decided(recipe: Recipe, plans: Mapping[str, LinearPlan], outer: Collection[str]) -> Recipe:
    """``recipe`` without its allocation and with an override for each linear of ``plans`` (by full name).

    ``outer``: full names of the embedding and, where it has weights of its own, the head.
    """
    linears = {name: plan for name, plan in plans.items() if name not in outer}
    kinds = Counter(plan.scheme for plan in linears.values())
    changes: dict[str, Any] = {"allocation": None, "weights": kinds.most_common(1)[0][0]}
    for key, module in zip(("embedding", "head"), outer, strict=False):
        changes[key] = plans[module].scheme
    bare = recipe.model_copy(update=changes)
    overrides = list(recipe.overrides)
    for name, plan in linears.items():
        as_usual = not plan.quantized or plan.rotation == rotation_for(recipe, name)
        rotated = None if as_usual else plan.rotation is not None
        overrides.append(Override(pattern=name, rotated=rotated, scheme=plan.scheme))
    return parse_recipe(bare.model_copy(update={"overrides": tuple(overrides)}).to_json(), recipe.name)
