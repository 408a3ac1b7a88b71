"""What a recipe says of the allocation of bits: which schemes a matrix may get, and what the whole has to meet."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from quern.core.scheme import CodecScheme
from quern.core.text.units import significant

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveCount = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Strict):
    """What a plan has to meet. Limits may stand together; with ``max_loss`` bytes become few, otherwise the loss small."""

    bits: Positive | None = None
    """Most bits per weight: 8 x bytes of all tensors / parameters, embedding and scales included."""
    bytes: PositiveCount | None = None
    """Most bytes of the artifact, all its files."""
    memory: PositiveCount | None = None
    """Most bytes of the artifact and the float16 key/value cache of ``context`` tokens."""
    context: PositiveCount | None = None
    """Tokens in that cache; null: 4096, or the model's longest text if that is shorter."""
    max_loss: Positive | None = None
    """Largest predicted mean KL divergence in nats a token."""
    min_speed: Positive | None = None
    """Least decoded tokens/s, where each reads all weights once at ``bandwidth_gb_s``."""
    bandwidth_gb_s: Positive | None = None
    """10^9 bytes/s; null: measured on this machine."""

    @model_validator(mode="after")
    def _check(self) -> Target:
        if all(value is None for value in (self.bits, self.bytes, self.memory, self.max_loss, self.min_speed)):
            raise ValueError("it names no limit; give one of bits, bytes, memory, max_loss and min_speed")
        if self.bits is not None and self.bytes is not None:
            raise ValueError("bits and bytes both say the size; give one of them")
        if self.context is not None and self.memory is None:
            raise ValueError("context goes with memory, and only with it")
        if self.bandwidth_gb_s is not None and self.min_speed is None:
            raise ValueError("bandwidth_gb_s goes with min_speed, and only with it")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}

    @property
    def label(self) -> str:
        """The limits in characters that a recipe's name may have: ``bits-3-loss-0.05``."""
        short = {"max_loss": "loss", "min_speed": "speed"}
        limits = {name: getattr(self, name) for name in ("bits", "bytes", "memory", "max_loss", "min_speed")}
        return "-".join(
            f"{short.get(name, name)}-{value if isinstance(value, int) else significant(value, 6)}"
            for name, value in limits.items()
            if value is not None
        )


class AllocationCandidate(_Strict):
    """One scheme that linears may get. In a recipe the keys of the scheme stand beside the others."""

    rotated: bool | None = None
    """Whether the recipe's rotation of inputs reaches a linear that gets it; null: as without the allocation."""
    scheme: CodecScheme

    @model_validator(mode="before")
    @classmethod
    def _gather_scheme(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "scheme" in values:
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        return {**own, "scheme": {key: value for key, value in values.items() if key not in cls.model_fields}}

    @model_serializer
    def _spread_scheme(self) -> dict[str, Any]:
        return {**self.scheme.to_json(), **({} if self.rotated is None else {"rotated": self.rotated})}


class Allocation(_Strict):
    """Which linear gets which scheme is computed from losses, measured for each linear and candidate, and a target."""

    candidates: Annotated[tuple[AllocationCandidate, ...], Field(min_length=1)]
    """What each linear of the decoder blocks may get, unless an override names its scheme."""
    outer: tuple[CodecScheme, ...] = ()
    """What embedding and head may get; none: what the recipe's ``embedding`` and ``head`` say."""
    target: Target
    """What the whole has to meet."""
    joined: bool = False
    """Whether linears that runtimes join into one matrix (q, k, v; gate, up) get one scheme."""
    rows: PositiveCount = 512
    """Rows of a linear that are rounded to estimate its loss, at most."""
