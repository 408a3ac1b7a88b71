"""Choosing the next token from the logits: temperature, top-k, and top-p or nucleus sampling.

Nucleus sampling is from Holtzman et al. 2020 (arXiv 1904.09751, section 3.1). The order is temperature, then top-k,
then top-p on what is left, as in transformers.
"""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quern import _native
from quern.core.errors import QuernError, UserError, option
from quern.core.seeds import generator

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SamplingOptions:
    """How random the choice may be."""

    temperature: float = 0.0
    """0: always the likeliest token. Otherwise logits are divided by it."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability; at least one."""

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise UserError(f"temperature is {self.temperature}; give 0 (the likeliest token) or a number above it")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 (all tokens) or how many of the likeliest may be chosen")
        if not (0 < self.top_p <= 1):
            raise UserError(f"top_p is {self.top_p}; give a probability above 0 and at most 1")


class Sampler:
    """Picks tokens one after another; the same seed and logits give the same tokens."""

    def __init__(self, options: SamplingOptions, seed: int) -> None:
        self.options = options
        self._generator = generator(seed, "generate")

    def copy(self) -> Sampler:
        """Another one that will choose as this one would from here on."""
        made = copy(self)
        made._generator = deepcopy(self._generator)
        return made

    def choose(self, logits: NDArray[np.floating]) -> int:
        """A token for ``logits`` ``(vocabulary,)``. Raises ``QuernError`` for logits that hold NaN or +infinity."""
        values, options = np.ascontiguousarray(logits, np.float32), self.options
        if options.temperature == 0:
            token = _native.likeliest(values)
        else:
            # One uniform number a token, whatever the options are, read off the cumulative distribution.
            place = self._generator.random()
            top_k = min(options.top_k, len(values))
            token = _native.sample(values, options.temperature, top_k, options.top_p, place)
        if token < 0:
            instead = option("engine='reference'", "--engine reference")
            raise QuernError(
                "the model's output holds NaN or infinite values, so its weights or its engine are broken. If "
                f"{instead} says so too, get the model's files again, or quantize again from the original"
            )
        return token


def choose_plainly(logits: NDArray[np.floating], options: SamplingOptions, place: float) -> int:
    """What the native sampler must choose for the uniform number ``place``: the whole distribution, written out."""
    if options.temperature == 0:
        return int(np.argmax(logits))
    tokens, probabilities = candidates(logits, options)
    found = np.searchsorted(np.cumsum(probabilities), place, side="right")
    return int(tokens[min(int(found), len(tokens) - 1)])


def candidates(logits: NDArray[np.floating], options: SamplingOptions) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens that may be chosen, likeliest first (ties: the lower token), and their probabilities, which sum to 1."""
    order = np.argsort(-logits, kind="stable")
    if options.top_k:
        order = order[: options.top_k]
    scaled = logits[order].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends the rest to -infinity, which is what it asks for
        weights = np.exp((scaled - scaled[0]) / options.temperature)
    probabilities = weights / weights.sum()
    if options.top_p < 1:
        reached = np.searchsorted(np.cumsum(probabilities), options.top_p, side="left")
        kept = min(int(reached) + 1, len(order))
        order, probabilities = order[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return order, probabilities
