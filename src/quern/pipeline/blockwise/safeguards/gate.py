"""The health gate: what is wrong with a block is found before its journal line is written (``quantization/health.py``).

``stop`` ends the run there, with what was finished kept, so that the same command with another policy goes on; ``repair``
stores a linear otherwise; ``warn`` goes on where there is something to go on with. A block whose outputs are no numbers ends
the run whatever the policy, because the next one could not be calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quern.core.artifact import Finding
from quern.core.errors import UnhealthyError, UserError, option
from quern.core.plan import KEPT, LinearPlan, Plan
from quern.core.recipe_parts import NEAREST
from quern.core.scheme import parse_scheme
from quern.core.text.scheme_text import scheme_text
from quern.core.text.units import significant
from quern.formats.base import FORMATS
from quern.pipeline.blockwise.job import Job
from quern.quantization.block import RoundedLinear
from quern.quantization.calibration.statistics import GroupStatistics
from quern.quantization.health import FLOAT16_GREATEST, NEIGHBOURS, count_wrong, greatest, standing
from quern.quantization.rounding.factor import UnusableHessianError

RoundAgain = Callable[[Mapping[str, LinearPlan], bool], list[RoundedLinear]]
"""Rounds some linears of the block by plans; the flag says that their weights were handed in before."""
EIGHT_BITS = parse_scheme({"codec": "integer", "bits": 8, "granularity": "channel"})
"""What a linear is stored as whose own scheme does not do; where the format cannot store that, its own values are kept."""
TOLD = ("silent inputs", "out of line")
"""Kinds that say something of the model and the text, and nothing is wrong with the artifact."""


class Gate:
    """Looks at one block."""

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        self.prefix = job.architecture.block(index).prefix
        self.findings: list[Finding] = []
        self.replaced: dict[str, LinearPlan] = {}
        """By name relative to the block, what a linear has become instead of what the recipe says."""
        self._greatest = 0.0

    def look_at_inputs(self, linears: Sequence[str], found: GroupStatistics) -> None:
        """Channels that were zero for every token; ``linears`` share them."""
        count = 0 if found.silent is None else int(found.silent.sum())
        tokens = max((one.tokens for one in found.by_linear.values()), default=0)
        if not count or not tokens or found.silent is None:
            return
        others = f" (and of {len(linears) - 1} linears that share them)" if linears[1:] else ""
        were = "was" if count == 1 else "were"
        problem = (
            f"{count} of its {len(found.silent)} inputs{others} {were} zero for all {tokens} calibration tokens, so that "
            "the text says nothing of their weights, which were rounded to nearest"
        )
        self._tell(Finding(tensor=self.prefix + linears[0], kind="silent inputs", problem=problem))

    def passed(self, plans: Mapping[str, LinearPlan], rounded: RoundAgain) -> list[RoundedLinear]:
        """The linears of ``plans``, which share an input, as they are to be stored; what is left out stays as it is.

        Raises ``UnhealthyError``.
        """
        try:
            found = {linear.name: linear for linear in rounded(plans, False)}
        except UnusableHessianError as error:
            found = self._without_hessian(plans, rounded, error)
        for name in plans:
            if name in found and (problem := self._problem(found[name])) is not None:
                self._judge(problem, found, rounded)
        return list(found.values())

    def look_at_outputs(self, hidden: Tensor, inputs: float = 0.0) -> None:
        """What the rounded block makes of a wave ``(sequences, time, width)``; ``inputs``: the greatest |x| that a linear of
        it read. Raises ``UnhealthyError`` for numbers that are none."""
        most = greatest(hidden)
        if not math.isfinite(most):
            wrong = count_wrong(hidden, self.job.workers)
            narrow = self.job.compute_dtype != torch.float32
            wider = ", or compute in calibration: {compute_dtype: float32}" if narrow else ""
            raise self._stopped(
                f"block {self.index} ({self.prefix.removesuffix('.')})",
                f"{wrong:,} of {hidden.numel():,} outputs are NaN or infinite for calibration tokens",
                f"Check the checkpoint{wider}",
            )
        self._greatest = max(self._greatest, most, inputs)

    def finish(self, rounded: Sequence[RoundedLinear]) -> None:
        """Last looks at the block that is going to be recorded; ``rounded``: as tuning has left them, where there is one."""
        for linear in rounded if self.job.recipe.tuning is not None else ():
            if wrong := count_wrong(linear.decoded, self.job.workers):
                raise self._stopped(
                    self.prefix + linear.name, _wrong_text(wrong, linear), "Leave tuning out of the recipe"
                )
        if self._greatest > FLOAT16_GREATEST and hands_on_float16(self.job):
            problem = (
                f"values up to {significant(self._greatest)} are handed from layer to layer on the calibration text, format "
                f"{self.job.recipe.format} runs in float16 here, and the greatest float16 is {FLOAT16_GREATEST:.0f}"
            )
            self._stop_or_tell(Finding(tensor=self.prefix.removesuffix("."), kind="beyond float16", problem=problem))

    def record(self) -> dict[str, Any]:
        """What the journal keeps; nothing of a healthy block."""
        if not self.findings:
            return {}
        stored = {self.prefix + name: plan.scheme.to_json() for name, plan in self.replaced.items()}
        return {"health": [one.model_dump(mode="json") for one in self.findings], "replaced": stored}

    def _problem(self, linear: RoundedLinear) -> Finding | None:
        """What is wrong with a rounded linear."""
        if wrong := count_wrong(linear.decoded, self.job.workers):
            return self._finding(linear.name, "not finite", _wrong_text(wrong, linear))
        if not math.isfinite(linear.relative_loss):
            return self._finding(linear.name, "not finite", "its error is no number")
        kind = self._kind(linear.name)
        found = standing(linear.relative_loss, kind, self._before, len(self.job.plan.quantized()))
        if found.state == "healthy":
            return None
        problem = (
            f"its relative error is {linear.relative_loss:.2g}, {significant(linear.relative_loss / found.usual)} times "
            + (
                f"that of the same linear in the {len(self._before[kind])} blocks before it ({found.usual:.2g})"
                if kind == linear.name
                else f"the usual one of experts in the blocks before it ({found.usual:.2g})"
            )
        )
        return self._finding(linear.name, found.state, problem)

    def _judge(self, problem: Finding, found: dict[str, RoundedLinear], rounded: RoundAgain) -> None:
        """Stop, tell, or put something better in its place into ``found``."""
        if problem.kind in TOLD or self.job.on_unhealthy != "repair":
            self._stop_or_tell(problem)
            return
        name = problem.tensor.removeprefix(self.prefix)
        for plan in self._remedies(name, problem, found[name].plan):
            if not (together := self._storable(name, plan, list(found))):
                continue
            if not plan.quantized:
                for one in together:
                    del found[one]
            else:
                again = {linear.name: linear for linear in rounded(dict.fromkeys(together, plan), True)}
                if any(self._problem(linear) is not None for linear in again.values()):
                    continue
                found |= again
                plan = again[name].plan
            self._replace(together, plan, problem)
            return
        raise self._stopped(
            problem.tensor, problem.problem, f"Format {self.job.recipe.format} can store nothing else for it"
        )

    def _kind(self, name: str) -> str:
        """What a linear is compared with: those of its name; of experts, whose numbers mean nothing, those of its role."""
        linear = self.job.architecture.block(self.index).linear(name)
        return name if linear.expert is None else f"expert {linear.role}"

    @cached_property
    def _before(self) -> dict[str, list[float]]:
        """By kind the errors of the linears in the blocks before, where they were stored by the same plan."""
        architecture, plan = self.job.architecture, self.job.plan
        kinds = {linear.name: self._kind(linear.name) for linear in architecture.block(self.index).linears}
        found: dict[str, list[float]] = {kind: [] for kind in kinds.values()}
        for before in range(max(0, self.index - NEIGHBOURS), self.index):
            prefix, record = architecture.block(before).prefix, self.job.work.done(f"block {before}") or {"layers": []}
            errors = {layer["linear"]: layer["relative_error"] for layer in record["layers"]}
            for name, kind in kinds.items():
                full = prefix + name
                if full in errors and full not in record.get("replaced", {}) and plan[full] == plan[self.prefix + name]:
                    found[kind].append(errors[full])
        return found

    def _remedies(self, name: str, problem: Finding, plan: LinearPlan) -> list[LinearPlan]:
        own = self.job.plan[self.prefix + name]
        nearest = [replace(own, rounding=NEAREST)] if problem.kind == "not finite" and plan.rounding != NEAREST else []
        return [*nearest, replace(own, scheme=EIGHT_BITS, rounding=NEAREST), KEPT]

    def _storable(self, name: str, plan: LinearPlan, present: Sequence[str]) -> list[str]:
        """The linears that have to become ``plan`` for the format to store ``name`` so: itself, or all that a runtime joins
        with it; none where it cannot."""
        fused = [one for one in self.job.architecture.block(self.index).linear(name).fused_with if one in present]
        for together in ([name], fused):
            changed = {self.prefix + one: plan for one in together}
            if together and _can_store(self.job, self.job.plan.replaced({**self._full(), **changed})):
                return together
        return []

    def _without_hessian(
        self, plans: Mapping[str, LinearPlan], rounded: RoundAgain, error: UnusableHessianError
    ) -> dict[str, RoundedLinear]:
        """All of them rounded to nearest, if that is wanted."""
        first = self.prefix + next(iter(plans))
        if self.job.on_unhealthy != "repair":
            raise UnhealthyError(f"{error.message}. {self._advice('repair')}") from error
        nearest = {name: replace(plan, rounding=NEAREST) for name, plan in plans.items()}
        found = {linear.name: linear for linear in rounded(nearest, True)}
        problem = Finding(
            tensor=first, kind="no Hessian", problem=error.message.removeprefix(f"{first}: ").split(". ")[0]
        )
        for name, linear in found.items():
            self._replace([name], linear.plan, problem.model_copy(update={"tensor": self.prefix + name}))
        return found

    def _replace(self, linears: Sequence[str], plan: LinearPlan, problem: Finding) -> None:
        self.replaced |= dict.fromkeys(linears, plan)
        others = [one for one in linears if self.prefix + one != problem.tensor]
        also = f", as were {' and '.join(others)}" if others else ""
        stored = f"as {scheme_text(plan.scheme)}, rounded to nearest" if plan.quantized else "as it was, unquantized"
        self._tell(problem.model_copy(update={"remedy": f"it was stored {stored}{also}"}))

    def _stop_or_tell(self, problem: Finding) -> None:
        if problem.kind == "not finite" or (problem.kind not in TOLD and self.job.on_unhealthy == "stop"):
            raise self._stopped(problem.tensor, problem.problem, self._advice(*_helping(problem)))
        self._tell(problem)

    def _tell(self, problem: Finding) -> None:
        self.findings.append(problem)
        self.job.progress.log(f"block {self.index}: {problem.text}")

    def _finding(self, name: str, kind: Any, problem: str) -> Finding:
        return Finding(tensor=self.prefix + name, kind=kind, problem=problem)

    def _full(self) -> dict[str, LinearPlan]:
        return {self.prefix + name: plan for name, plan in self.replaced.items()}

    def _stopped(self, tensor: str, problem: str, advice: str) -> UnhealthyError:
        kept = f"the {self.index} blocks before it are kept" if self.index else "nothing of it is kept"
        return UnhealthyError(f"{tensor}: {problem}. The run stops here; {kept}. {advice}")

    def _advice(self, *policies: str) -> str:
        does = {"repair": "to store that linear otherwise", "warn": "to go on with it as it is"}
        ways = [f"{option(f'on_unhealthy={p!r}', f'--on-unhealthy {p}')} {does[p]}" for p in policies]
        return f"The same command goes on with {', or with '.join(ways)}"


def hands_on_float16(job: Job) -> bool:
    """Whether what runs the artifact hands float16 numbers from layer to layer."""
    config = job.checkpoint.config
    said = FORMATS.get(job.recipe.format).activations_dtype or config.get("dtype") or config.get("torch_dtype")
    return bool(said == "float16")


def replaced_plans(job: Job, records: Sequence[Mapping[str, Any]]) -> dict[str, LinearPlan]:
    """By full name, what linears have become instead, as the journal's ``records`` of blocks say."""
    found = {}
    for name, values in (item for record in records for item in record.get("replaced", {}).items()):
        scheme = parse_scheme(values)
        found[name] = replace(job.plan[name], scheme=scheme, rounding=NEAREST) if scheme.quantized else KEPT
    return found


def findings_of(records: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """All findings in the journal's ``records`` of blocks."""
    return [Finding.model_validate(one) for record in records for one in record.get("health", ())]


def _can_store(job: Job, plan: Plan) -> bool:
    try:
        FORMATS.get(job.recipe.format).writer(job.recipe, plan, job.architecture).check()
    except UserError:
        return False
    return True


def _wrong_text(count: int, linear: RoundedLinear) -> str:
    return f"{count:,} of its {linear.decoded.numel():,} weights are NaN or infinite once they are rounded"


def _helping(problem: Finding) -> tuple[str, ...]:
    """Policies that help."""
    if problem.kind == "not finite":
        return ("repair",)
    return ("warn",) if problem.kind == "beyond float16" else ("repair", "warn")
