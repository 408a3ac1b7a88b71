"""What quantizing and running a model takes, counted from its shapes and the recipe: operations, bytes, weights.

A multiplication and an addition are two operations. Passes over calibration tokens are those of the pipeline: every stage of
a block is run as far as what its linears read, then the rounded block is run once; Fisher token weights take a pass
forward, and one backward in which blocks are computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from quern.advisor.forecasting.kinds import rounding_kind
from quern.architectures.base import Architecture, BlockSpec, LinearSpec
from quern.core.plan import Plan
from quern.core.recipe import Recipe

BACKWARD = 2
"""Passes that a backward one is worth: blocks are computed again, then gradients of what they read."""
TUNING = 4
"""Passes that a step of tuning is worth: forward, backward, and gradients of weights."""


@dataclass(frozen=True)
class Work:
    """Of quantizing one model by one recipe; operations and weights of all blocks, and of embedding and head apart."""

    token_operations: float
    """For each calibration token, in the blocks."""
    weighing_operations: float
    """Those of them that token weights take."""
    head_operations: float
    """For each calibration token, at the head."""
    feedback_operations: float
    """Of factorizing Hessians and feeding errors forward; no tokens."""
    weights: Counter[str]
    """That are rounded in the blocks, by ``rounding_kind``."""
    outer_weights: Counter[str]
    """The same of embedding and head."""


def work_of(architecture: Architecture, plan: Plan, recipe: Recipe, needs_hessian: Iterable[str]) -> Work:
    """Counted; ``needs_hessian``: the names of the roundings that read Hessians."""
    hessian = set(needs_hessian)
    rows, columns = architecture.config.vocab_size, architecture.config.hidden_size
    rounds = any(one.rounding.method in hessian for one in plan.quantized().values())
    fisher = recipe.calibration.token_weight == "fisher" and (rounds or recipe.tuning is not None)
    blocks = [_block(block, plan, recipe, hessian, fisher) for block in architecture.blocks]
    outer: Counter[str] = Counter()
    for module in architecture.outer:
        if plan[module].quantized:
            outer[rounding_kind(plan[module])] += rows * columns
    return Work(
        token_operations=sum(tokens for tokens, _, _ in blocks),
        weighing_operations=(1 + BACKWARD) * forward_operations(architecture) if fisher else 0.0,
        head_operations=(1 + BACKWARD) * 2 * rows * columns + 2 * columns**2 if fisher else 0.0,
        feedback_operations=sum(feedback for _, feedback, _ in blocks),
        weights=sum((weights for _, _, weights in blocks), Counter()),
        outer_weights=outer,
    )


def forward_operations(architecture: Architecture) -> int:
    """Of one token through all blocks, attention apart."""
    return sum(_forward(block, block.linears) for block in architecture.blocks)


def _forward(block: BlockSpec, linears: Iterable[LinearSpec]) -> int:
    """Of one token through some linears of a block; of experts it meets ``experts_per_token``."""
    return round(sum(_met(block, linear) * 2 * linear.shape[0] * linear.shape[1] for linear in linears))


def _met(block: BlockSpec, linear: LinearSpec) -> float:
    """Share of the tokens that meet a linear, of experts on average."""
    return 1.0 if linear.expert is None else block.experts_per_token / block.experts


def _block(
    block: BlockSpec, plan: Plan, recipe: Recipe, needs_hessian: set[str], weighs: bool
) -> tuple[float, float, Counter[str]]:
    plans = {linear.name: plan[block.prefix + linear.name] for linear in block.linears}
    rounded = [linear for linear in block.linears if plans[linear.name].quantized]
    weights: Counter[str] = Counter()
    for linear in rounded:
        weights[rounding_kind(plans[linear.name])] += linear.shape[0] * linear.shape[1]
    hessians = [linear for linear in rounded if plans[linear.name].rounding.method in needs_hessian]
    fisher = recipe.calibration.token_weight == "fisher"
    own = hessians if fisher else list({linear.input_group: linear for linear in hessians}.values())
    feedback = float(sum(linear.shape[0] * linear.shape[1] ** 2 for linear in hessians))
    feedback += sum(linear.shape[1] ** 3 / 3 for linear in own)
    if not recipe.needs_calibration:
        return 0.0, feedback, weights
    forward = _forward(block, block.linears)
    passes = forward + (_captures(block) if hessians or recipe.transforms else 0)
    follows = any(plans[linear.name].rounding.target == "drift" for linear in rounded) or recipe.tuning is not None
    tokens = passes * (1 + follows) + sum(_met(block, linear) * 2 * linear.shape[1] ** 2 for linear in own)
    if weighs:
        tokens += (1 + BACKWARD) * forward
    if recipe.tuning is not None:
        runs = recipe.tuning.passes * (1 + recipe.tuning.between * (len(block.stages) - 1))
        tokens += runs * TUNING * forward
    return float(tokens), feedback, weights


def _captures(block: BlockSpec) -> int:
    """Of one token through the block as far as each stage, one after the other."""
    before: list[LinearSpec] = []
    total = 0
    for stage in block.stages:
        total += _forward(block, before)
        before += [block.linear(name) for group in stage for name in group.linears]
    return total
