"""Which runtimes load what a recipe writes, and why others do not: one place for exports and recommendations.

Of quern's own format: ``transformers`` loads it once ``import quern`` has registered the plug-in. Of compressed-tensors:
tried with transformers 5.24 and compressed-tensors 0.20.1 without quern, and with vLLM 0.32 on a CPU; what needs a GPU
was read in vLLM's source (docs/compressed-tensors.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quern.core.recipe import Recipe
from quern.core.results import Target

FORMATS_READ: dict[str, tuple[Target, ...]] = {
    "quern": ("quern", "transformers"),
    "compressed-tensors": ("vllm", "transformers", "quern"),
}
"""By format: the runtimes that load what has no obstacle in it."""
_VLLM_BITS = (4, 8)


@dataclass(frozen=True)
class Obstacle:
    """Why a runtime does not run an artifact as it is."""

    target: Target
    reason: str
    """A clause, with what helps."""


def readers_of(recipe: Recipe) -> tuple[Target, ...]:
    """The runtimes that load what ``recipe`` writes and compute with it what quern does, without further settings."""
    stopped = {obstacle.target for obstacle in obstacles_of(recipe)}
    return tuple(target for target in FORMATS_READ.get(recipe.format, ("quern",)) if target not in stopped)


def obstacles_of(recipe: Recipe) -> Iterator[Obstacle]:
    """What keeps readers of the recipe's format from running the artifact."""
    if recipe.format != "compressed-tensors":
        return
    schemes = [scheme for scheme in (recipe.weights, *recipe.overrides, recipe.head) if scheme.quantized]
    if any(not scheme.symmetric for scheme in schemes):
        yield Obstacle(
            "transformers",
            "loads asymmetric weights only by from_pretrained(..., "
            "quantization_config=CompressedTensorsConfig(dequantize=True)); symmetric ones it loads as they are",
        )
    if recipe.rotated:
        yield Obstacle(
            "transformers",
            "drops the rotation without a word and computes nonsense; docs/compressed-tensors.md has the lines that add it",
        )
        yield Obstacle(
            "vllm",
            "rotates inputs on one GPU only (read in its source, not tried), and none of a linear that has a bias",
        )
    packed = schemes if recipe.activations.mode == "none" else [recipe.head] * recipe.head.quantized
    odd = sorted({scheme.bits for scheme in packed} - {*_VLLM_BITS})
    if odd:
        yield Obstacle("vllm", f"has kernels for packed weights of 4 and 8 bits, not of {' and '.join(map(str, odd))}")
