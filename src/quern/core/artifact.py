"""What an artifact says of itself, whatever its format."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quern.core.errors import UserError

PROVENANCE = "quern.json"
"""File with what the artifact was made from and what rounding cost."""


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """``quantization_config`` of a config.json, None where there is none. Raises ``UserError`` if it is no object."""
    found = config.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise UserError(f"config.json: quantization_config is {str(found)[:40]!r}; it must be an object")
    return found


class InputSummary(BaseModel):
    """What calibration saw of the inputs that some linears share; ``quantization/calibration/sketch.py`` makes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    linears: Annotated[tuple[str, ...], Field(min_length=1)]
    """Full names of those that are quantized."""
    reach: Annotated[float, Field(ge=0)]
    """99.9 % of all |x| lie within it."""
    greatest: Annotated[float, Field(ge=0)]
    """|x| that occurred."""
    profile: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    """Shares of the energy in runs of neighbouring channels."""
    spread: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None
    """Root mean square of what halves of the calibration text differ by: log2 of the reach, distance of the profile."""
    clip: Annotated[float, Field(gt=0)] | None
    """What static activations cut |x| at; None for others, and where inputs are rotated first."""
    clipped: Annotated[float, Field(ge=0, le=1)] | None
    """The share of |x| beyond that."""


class Finding(BaseModel):
    """What the health gate found of one tensor; ``pipeline/blockwise/safeguards/gate.py``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: str
    """Full name of a linear, or of a block where its outputs are meant."""
    kind: Literal["damaged", "out of line", "not finite", "no Hessian", "beyond float16", "silent inputs"]
    problem: str
    """A clause about it."""
    remedy: str | None = None
    """What it has become instead of what the recipe asks for; None where it was left as it is."""

    @property
    def text(self) -> str:
        """A sentence for notes."""
        return f"{self.tensor}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


class CalibratedInputs(BaseModel):
    """What calibration saw of the inputs of all quantized linears that every token meets."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: Annotated[int, Field(gt=0)]
    sequences: Annotated[int, Field(gt=0)]
    """Into which they were cut."""
    groups: tuple[InputSummary, ...]

    @model_validator(mode="after")
    def _check(self) -> CalibratedInputs:
        if self.sequences > self.tokens:
            raise ValueError(f"{self.tokens} tokens are no {self.sequences} sequences")
        return self
