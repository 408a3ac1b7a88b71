"""What is foretold of a model before any work is done: figures, each with the way it was come by.

Documented in ``docs/forecast.md``. ``basis`` keeps apart what was counted, what rests on runs of the real code on this
machine, and what rests on published figures of another one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Basis = Literal["counted", "measured", "predicted"]
"""``counted``: from shapes and headers; ``measured``: from short runs on this machine; ``predicted``: for a machine that is
not here, from what its hardware file says and from fractions of it that runtimes are known to reach."""

MachineKind = Literal["cpu", "cuda", "metal"]
"""Where weights lie and are computed with: processors, an NVIDIA GPU, an Apple GPU that shares the memory."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Foretold(_Strict):
    """One figure."""

    value: float | None
    """Null where nothing is known or possible; ``derivation`` then says why."""
    unit: Literal["bytes", "seconds", "tokens/s", "tokens"]
    basis: Basis
    derivation: str
    """The formula with its numbers, on one line."""


class RecipeForecast(_Strict):
    """What one recipe makes of a model, and what that takes."""

    recipe: str
    format: str
    runtime: str
    """What the running figures are those of."""
    artifact_bytes: Foretold
    bits_per_weight: float | None
    quantize_seconds: Foretold
    quantize_memory: Foretold
    quantize_disk: Foretold
    run_memory: Foretold
    """With a key/value cache of ``Forecast.context`` tokens."""
    prefill: Foretold
    """Of a prompt of 512 tokens, or of the context where that is shorter."""
    decode: Foretold
    """One text alone, behind that prompt."""
    contexts: dict[str, Foretold]
    """By precision of the key/value cache: the longest text that fits."""
    notes: list[str] = []


class ForecastMachine(_Strict):
    """The machine that is spoken of."""

    name: str
    kind: MachineKind
    here: bool
    """Whether it is this one."""
    description: str
    memory_bytes: int
    """Of RAM, or of the GPU."""


class Forecast(_Strict):
    """The whole answer of ``quern forecast``."""

    quern_version: str
    created: str
    """UTC, ISO 8601."""
    model: str
    architecture: str
    parameters: int
    bf16_bytes: int
    machine: ForecastMachine
    threads: int
    context: int
    recipes: list[RecipeForecast]
    warnings: list[str] = []


class Placed(_Strict):
    """A way to run a model on a machine: recipe, format and runtime."""

    machine: str
    kind: MachineKind
    recipe: str
    format: str
    runtime: str
    fits: bool
    reason: str
    """Why it stands where it stands; of what does not fit by how much."""
    score: float | None
    """In the scenario; null for what does not fit."""
    artifact_bytes: int
    bits_per_weight: float
    memory_bytes: int
    """Needed with the context."""
    memory_limit: int
    prefill: Foretold
    decode: Foretold
    kl_elsewhere: float | None
    """KL divergence of the recipe on the model that ``Placement.losses_of`` names; of this model nothing is known."""


class Placements(_Strict):
    """Which machine runs a model, with which recipe and runtime: the answer of ``quern recommend --model``."""

    model: str
    parameters: int
    bf16_bytes: int
    scenario: str
    context: int
    choice: Placed | None
    ranking: list[Placed]
    """What fits, best first."""
    excluded: list[Placed]
    """What does not, nearest first."""
    losses_of: str
    """The model that ``kl_elsewhere`` was measured on."""
    notes: list[str]
