"""What a row gains and what it loses, in one unit: doublings and halvings.

Size and speed enter as base-2 logarithms of their ratio to the unquantized model: half the bytes and twice the speed
are +1 each. Accuracy loss enters as the halvings of an *unquantized* model that would lose as much. Kaplan et al.,
"Scaling Laws for Neural Language Models" (2020), equation 1.1: the cross entropy of a model with N parameters is
proportional to N^-0.076. A model whose cross entropy H grows by the factor 1 + KL / H is therefore worth one with

    log2(1 + KL / H) / 0.076

fewer doublings of its parameters. KL (nats a token) and H (the natural logarithm of the unquantized model's perplexity)
are measured; only the exponent is taken from the literature.

The same law gives the default ceiling of the loss: a quantized model that loses more than an unquantized model of the
same number of bytes would is not worth having, because the smaller model does better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from quern.advisor.drift import favour
from quern.core.errors import UserError
from quern.core.results import Row, Scenario, WeightName, unquantized_row
from quern.core.text.language import gettext, translatable
from quern.core.text.suggest import did_you_mean

SCALING_EXPONENT = 0.076
"""Exponent of the number of parameters in the scaling law of the cross entropy (Kaplan et al. 2020, equation 1.1)."""
SMALL_LOSS = 0.01
"""Share of the unquantized model's cross entropy up to which a KL divergence counts as small."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much one halving of size, one doubling of speed and one halving's worth of loss count."""

    size: float
    speed: float
    loss: float

    @classmethod
    def mix(cls, parts: Mapping[str, float]) -> Weights:
        """``parts`` (``size``, ``speed``, ``loss``; what is left out counts nothing) scaled to add up to 1.

        Raises ``UserError`` for another key, a negative or infinite part, or nothing above 0.
        """
        known = get_args(WeightName)
        if unknown := [name for name in parts if name not in known]:
            raise UserError(
                gettext(
                    "unknown weight {name!r}; known ones: {known}{hint}",
                    name=unknown[0],
                    known=", ".join(known),
                    hint=did_you_mean(unknown[0], known),
                )
            )
        total = sum(parts.values())
        if not (math.isfinite(total) and total > 0 and all(part >= 0 for part in parts.values())):
            said = ", ".join(f"{name}={part:g}" for name, part in parts.items()) or "none"
            raise UserError(
                gettext("weights must be finite, at least 0, and one of them above 0; got {said}", said=said)
            )
        return cls(**{name: parts.get(name, 0.0) / total for name in known})

    def to_json(self) -> dict[WeightName, float]:
        """As ``results.json`` holds them."""
        return {"size": self.size, "speed": self.speed, "loss": self.loss}


WEIGHTS: dict[Scenario, Weights] = {
    "storage": Weights(size=2 / 3, speed=0.0, loss=1 / 3),
    "speed": Weights(size=0.0, speed=2 / 3, loss=1 / 3),
    "overall": Weights(size=1 / 3, speed=1 / 3, loss=1 / 3),
}
"""Of the scenarios that bring their own; those of ``mix`` are the user's."""


def positive(value: float | None) -> float | None:
    """``value`` if it is a number above 0, else None (not measured: no rate, time or size is 0)."""
    return value if value is not None and value > 0 else None


def loss_of(row: Row) -> float | None:
    """KL divergence in nats a token; 0 for the unquantized reference, which is what KL is measured against."""
    if row.kind == "unquantized":
        return 0.0
    return None if row.kl_mean is None else max(0.0, row.kl_mean)


@dataclass(frozen=True)
class Yardstick:
    """What ratios are taken against: the unquantized model, or where it lacks a number the worst that was measured."""

    bytes: float
    decode: float | None
    """Tokens/s; None when no row has it."""
    first_token: float | None
    """Seconds; None when no row has it."""
    entropy: float | None
    """Cross entropy in nats a token of the unquantized model (else of the best row); None when no row has it."""
    small_loss: float | None
    """KL in nats a token up to which the loss is small: a share of the entropy, or the noise floor where that is higher;
    None without an entropy."""
    unquantized: bool
    """Whether both speeds (as far as any row has them) are those of the unquantized model."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Yardstick:
        """The yardstick of ``rows`` (at least one)."""
        reference = unquantized_row(rows)
        anchor = reference or rows[0]
        perplexity = _from_reference(reference, rows, lambda row: row.perplexity, min)
        decode = _from_reference(reference, rows, lambda row: row.decode_tokens_per_s, min)
        first_token = _from_reference(reference, rows, lambda row: row.time_to_first_token_s, max)
        entropy = None if perplexity is None else positive(math.log(perplexity))
        floors = [row.kl_noise_floor for row in rows if row.kl_noise_floor is not None]
        return cls(
            bytes=anchor.bytes / (1 - anchor.compression),
            decode=decode,
            first_token=first_token,
            entropy=entropy,
            small_loss=None if entropy is None else max([SMALL_LOSS * entropy, *floors]),
            unquantized=reference is not None
            and (positive(reference.decode_tokens_per_s), positive(reference.time_to_first_token_s))
            == (decode, first_token),
        )

    def size_gain(self, row: Row) -> float:
        """Halvings of bytes against the bf16 checkpoint."""
        return math.log2(self.bytes / row.bytes)

    def speed_gain(self, row: Row) -> float | None:
        """Mean doublings of decode speed and of 1 / time to first token, over what any row has.

        None when the row lacks one of them or no row has either.
        """
        gains: list[float] = []
        if self.decode is not None:
            decode = positive(row.decode_tokens_per_s)
            if decode is None:
                return None
            gains.append(math.log2(decode / self.decode))
        if self.first_token is not None:
            first_token = positive(row.time_to_first_token_s)
            if first_token is None:
                return None
            gains.append(math.log2(self.first_token / first_token))
        return sum(gains) / len(gains) if gains else None

    def loss_cost(self, row: Row) -> float | None:
        """Halvings of an unquantized model that would lose as much; None when KL or every perplexity is missing."""
        loss = loss_of(row)
        if loss is None or loss == 0:
            return loss
        return None if self.entropy is None else math.log2(1 + loss / self.entropy) / SCALING_EXPONENT

    def loss_ceiling(self, row: Row) -> float | None:
        """KL in nats a token that an unquantized model of ``row``'s bytes would lose; 0 if the row is no smaller."""
        if self.entropy is None:
            return None
        return self.entropy * max(0.0, 2 ** (SCALING_EXPONENT * self.size_gain(row)) - 1)


def _from_reference(
    reference: Row | None,
    rows: Sequence[Row],
    field: Callable[[Row], float | None],
    otherwise: Callable[[list[float]], float],
) -> float | None:
    if reference is not None and (value := positive(field(reference))) is not None:
        return value
    measured = [value for row in rows if (value := positive(field(row))) is not None]
    return otherwise(measured) if measured else None


@dataclass(frozen=True)
class Scored:
    """A row that may be chosen, with its gains and its loss in doublings and halvings."""

    row: Row
    size: float
    speed: float | None
    loss: float
    score: float


SAME_SIZE = 0.001
"""Sizes this close (relative) count as equal: headers differ by the length of a recipe's name."""


@dataclass(frozen=True)
class _Cost:
    """A number turned so that less is better, and the range in which it was seen."""

    value: float
    low: float
    high: float

    def no_worse_than(self, other: _Cost) -> bool:
        """Less or equal, or each value within the other's range: then they differ no more than repeats do."""
        return self.value <= other.value or (self.value <= other.high and self.low <= other.value)


_DECODE, _LOSS = 1, 2
"""Places in what ``_costs`` returns."""
_SPEEDS = (_DECODE, 3)
_NAMES = {_DECODE: translatable("decode speed"), _LOSS: "KL"}


def _costs(row: Row, *, first_token: bool) -> tuple[_Cost | None, ...]:
    """Bytes, seconds a decoded token, KL and, if asked for, seconds to the first token; None where not measured."""
    loss = loss_of(row)
    decode, first = positive(row.decode_tokens_per_s), positive(row.time_to_first_token_s)
    spreads = row.speed_spread or {}
    decode_cost = first_cost = None
    if decode is not None:
        spread = spreads.get("decode_tokens_per_s")
        low, high = (spread.low, spread.high) if spread and spread.low > 0 else (decode, decode)
        decode_cost = _Cost(1 / decode, 1 / max(high, decode), 1 / min(low, decode))
    if first is not None and first_token:
        spread = spreads.get("time_to_first_token_s")
        low, high = (spread.low, spread.high) if spread else (first, first)
        first_cost = _Cost(first, min(low, first), max(high, first))
    return (
        _Cost(row.bytes, row.bytes * (1 - SAME_SIZE), row.bytes * (1 + SAME_SIZE)),
        decode_cost,
        None if loss is None else _Cost(loss, loss, loss),
        first_cost,
    )


def _dominates(
    mine: tuple[_Cost | None, ...], theirs: tuple[_Cost | None, ...], counted: Sequence[int], favoured: float
) -> bool:
    """Whether ``mine`` is no worse in everything counted and better in something.

    In speed it has to lead by more than the machine ``favoured`` it.
    """
    better = False
    for index in counted:
        one, other = mine[index], theirs[index]
        if one is None or other is None or not one.no_worse_than(other):
            return False
        if favoured > 0 and index in _SPEEDS and one.value * (1 + favoured) >= other.value:
            return False
        better = better or not other.no_worse_than(one)
    return better


def dominators(rows: Sequence[Row], *, first_token: bool, with_drift: bool = True) -> dict[int, int]:
    """For the place in ``rows`` of every dominated row, the place of a row that dominates it.

    A row dominates another if it is as small or smaller, as fast or faster (decode tokens/s and, with ``first_token``,
    time to first token), as accurate or more accurate (KL), and better in at least one of these. Sizes within 0.1 %
    are equal; so are speeds of which each lies within the range of the other's rounds. A row for which the machine ran
    faster has to lead in speed by more than that (``favour``; not without ``with_drift``). A number that no row has does
    not count; a row that lacks a number that another has neither dominates nor is dominated.
    """
    costs = [_costs(row, first_token=first_token) for row in rows]
    counted = [index for index in range(4) if any(cost[index] is not None for cost in costs)]

    def beats(one: int, other: int) -> bool:
        favoured = favour(rows[one], rows[other]) if with_drift else 0.0
        return _dominates(costs[one], costs[other], counted, favoured)

    def badness(place: int) -> tuple[float, ...]:
        return tuple(-math.inf if (cost := costs[place][index]) is None else cost.value for index in (2, 0, 1, 3))

    # "Equal within its range" is not transitive. Going from the worst row to the best and letting only rows that still
    # stand dominate keeps the outcome independent of the order of the rows, and at least one row standing.
    standing = set(range(len(rows)))
    for place in sorted(standing, key=badness, reverse=True):
        if any(beats(other, place) for other in standing if other != place):
            standing.discard(place)
    best_first = sorted(range(len(rows)), key=lambda place: (place not in standing, badness(place)))
    return {
        place: next(other for other in best_first if beats(other, place))
        for place in range(len(rows))
        if place not in standing
    }


def as_fast(row: Row, other: Row) -> bool:
    """Whether ``row`` decodes no slower than ``other``, or not distinguishably slower; False where not measured.

    A lead of ``other`` that is no greater than what the machine ran faster for it distinguishes nothing.
    """
    mine, theirs = _costs(row, first_token=False)[_DECODE], _costs(other, first_token=False)[_DECODE]
    if mine is None or theirs is None:
        return False
    return mine.no_worse_than(theirs) or mine.value <= theirs.value * (1 + favour(other, row))


def missing_figures(rows: Sequence[Row]) -> list[list[str]]:
    """For each row, which of decode speed and KL it lacks although another row has it."""
    costs = [_costs(row, first_token=False) for row in rows]
    counted = [index for index in _NAMES if any(cost[index] is not None for cost in costs)]
    return [[_NAMES[index] for index in counted if cost[index] is None] for cost in costs]


def pareto_front(rows: Sequence[Row]) -> set[str]:
    """Names of the rows that no other beats in bytes, decode tokens/s and KL at once (see ``dominators``).

    A number that no row has does not count. A row that lacks one that another row has is not on the front: nothing
    shows that it belongs there.
    """
    beaten, missing = dominators(rows, first_token=False), missing_figures(rows)
    return {row.name for place, row in enumerate(rows) if place not in beaten and not missing[place]}
