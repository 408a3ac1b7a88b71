"""What a user insists on, and by how much a row misses it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quern.advisor.figures import bytes_text, percent_text, significant
from quern.advisor.scoring import Yardstick, loss_of, positive
from quern.core.errors import UserError
from quern.core.results import Row


@dataclass(frozen=True)
class Miss:
    """A limit that a row does not keep."""

    limit: Literal["size", "speed", "loss"]
    text: str
    doublings: float
    """log2 of the ratio between the row's number and the limit; infinite when not measured or when the limit is 0."""


@dataclass(frozen=True)
class Constraints:
    """Limits on what may be recommended; None where nothing was said. Raises ``UserError`` for what is no limit."""

    max_size: int | None = None
    """Bytes on disk."""
    max_loss: float | None = None
    """Mean KL divergence in nats a token. Without it, the default ceiling of each row holds."""
    min_speed: float | None = None
    """Decode tokens/s."""

    def __post_init__(self) -> None:
        for name, value, zero_allowed in (
            ("max size (bytes)", self.max_size, False),
            ("max loss (nats a token)", self.max_loss, True),
            ("min speed (tokens/s)", self.min_speed, False),
        ):
            if value is not None and not (math.isfinite(value) and (value > 0 or (zero_allowed and value == 0))):
                raise UserError(
                    f"{name} must be a finite number {'of at least' if zero_allowed else 'above'} 0; got {value}"
                )

    def __str__(self) -> str:
        parts = []
        if self.max_size is not None:
            parts.append(f"size at most {bytes_text(self.max_size)}")
        if self.max_loss is not None:
            parts.append(f"KL at most {significant(self.max_loss)}")
        if self.min_speed is not None:
            parts.append(f"decode speed at least {significant(self.min_speed)} tokens/s")
        return ", ".join(parts)

    def misses(self, row: Row, yardstick: Yardstick) -> Iterator[Miss]:
        """Every limit that ``row`` does not keep."""
        if self.max_size is not None and row.bytes > self.max_size:
            ratio = row.bytes / self.max_size
            over = f"{bytes_text(row.bytes)} is {_beyond(ratio)} the {bytes_text(self.max_size)} allowed"
            yield Miss("size", f"{over} ({bytes_text(row.bytes - self.max_size)} too many)", math.log2(ratio))
        if self.min_speed is not None:
            yield from self._speed_miss(positive(row.decode_tokens_per_s), self.min_speed)
        yield from self._loss_miss(row, yardstick)

    @staticmethod
    def _speed_miss(decode: float | None, least: float) -> Iterator[Miss]:
        asked = f"the {significant(least)} tokens/s asked for"
        if decode is None:
            yield Miss(
                "speed", f"its decode speed was not measured, so nothing shows that it reaches {asked}", math.inf
            )
        elif decode < least:
            text = f"decodes {significant(decode)} tokens/s, {percent_text(1 - decode / least)} below {asked}"
            yield Miss("speed", text, math.log2(least / decode))

    def _loss_miss(self, row: Row, yardstick: Yardstick) -> Iterator[Miss]:
        loss = loss_of(row)
        limit = yardstick.loss_ceiling(row) if self.max_loss is None else self.max_loss
        if loss is None:
            if self.max_loss is not None:
                text = f"its KL was not measured, so nothing shows that it is at most {significant(self.max_loss)}"
                yield Miss("loss", text, math.inf)
            return
        if limit is None or loss <= limit:
            return
        ratio = loss / limit if limit > 0 else math.inf
        text = f"KL {significant(loss)} is {_beyond(ratio)} the {significant(limit)} "
        if self.max_loss is not None:
            text += "allowed"
        elif limit > 0:
            text += "that an unquantized model of this size would lose: a smaller model serves better"
        else:
            text = f"it loses accuracy (KL {significant(loss)}) and is no smaller than the bf16 checkpoint"
        yield Miss("loss", text, math.log2(ratio))


def _beyond(ratio: float) -> str:
    """How far a value is above its limit: 1.22 -> "22.0 % over", 4.1 -> "4.1 times"."""
    if math.isinf(ratio):
        return "over"
    return f"{percent_text(ratio - 1)} over" if ratio < 3 else f"{significant(ratio)} times"
