"""What writers that refuse say, with every reason at once, and what runtimes that join linears cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quern.architectures.base import Architecture
from quern.core.errors import UserError, option
from quern.core.plan import LinearPlan, Plan

QUERN = option("format='quern'", "--format quern")
"""What is there for whatever another format cannot hold."""


def cannot_store(format: str, recipe: str, problems: Mapping[str, Sequence[str]]) -> UserError:
    """The error for a recipe (its name) that ``format`` cannot store; ``problems``: clauses, with the modules that they are
    about, or none where a clause names its modules itself."""
    lines = (f"  {problem}{_examples(modules)}" for problem, modules in problems.items())
    return UserError(
        f"format {format} cannot store recipe {recipe!r}:\n" + "\n".join(lines) + f"\nChange the recipe, or use {QUERN}"
    )


def _examples(modules: Sequence[str]) -> str:
    """One module's name and how many more there are."""
    if not modules:
        return ""
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return f" ({modules[0]}{more})"


def torn(architecture: Architecture, plan: Plan, alike: Callable[[LinearPlan], object]) -> list[str]:
    """Clauses about linears that vLLM joins into one matrix and that are not ``alike``."""
    found: dict[str, None] = {}
    for block in architecture.blocks:
        for linear in block.linears:
            plans = [plan[block.prefix + name] for name in linear.fused_with]
            if any(p.quantized for p in plans) and any(alike(p) != alike(plans[0]) for p in plans):
                names = ", ".join(name.rpartition(".")[2] for name in linear.fused_with)
                found[f"{names} of {block.prefix}{linear.name.rpartition('.')[0]}"] = None
    joined = [
        f"{names} need one scheme, because vLLM joins them into one matrix; change the overrides" for names in found
    ]
    return [*joined, *_torn_experts(architecture, plan, alike)]


def _torn_experts(architecture: Architecture, plan: Plan, alike: Callable[[LinearPlan], object]) -> list[str]:
    """The same of all experts of a block."""
    for block in architecture.blocks:
        plans = [plan[block.prefix + linear.name] for linear in block.linears if linear.expert is not None]
        if any(alike(one) != alike(plans[0]) for one in plans):
            said = f"the experts of {block.prefix.removesuffix('.')}"
            return [f"{said} need one scheme, because vLLM computes them together; change the overrides"]
    return []


def misnamed(architecture: Architecture) -> list[str]:
    """A clause about linears that runtimes of other formats look for under other names."""
    if not architecture.renamed:
        return []
    return [f"runtimes look for the linears of a {architecture.model_type} model under other names than quern's"]
