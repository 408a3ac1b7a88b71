"""The sentences of a recommendation. Every one of them carries the figures that it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from quern.advisor.constraints import Constraints, Miss
from quern.advisor.figures import bytes_text, percent_text, seconds_text, signed, significant
from quern.advisor.scoring import Scored, Weights, Yardstick, loss_of, positive
from quern.core.results import FOREIGN_LIMIT, Row, Scenario


def dominated_text(row: Row, winner: Row, *, first_token: bool) -> str:
    """That ``winner`` is better than ``row``, with the figures of both."""
    figures = figures_against(row, winner, first_token=first_token)
    return f"dominated by {winner.name}, which is no larger, no slower and no less accurate: {figures}"


def figures_against(row: Row, winner: Row, *, first_token: bool) -> str:
    """The figures of ``winner``, each beside that of ``row``."""
    parts = [_against(bytes_text(winner.bytes), bytes_text(row.bytes))]
    if winner.decode_tokens_per_s and row.decode_tokens_per_s:
        rates = _against(significant(winner.decode_tokens_per_s), significant(row.decode_tokens_per_s))
        parts.append(f"decodes {rates} tokens/s")
    if first_token and winner.time_to_first_token_s and row.time_to_first_token_s:
        times = _against(seconds_text(winner.time_to_first_token_s), seconds_text(row.time_to_first_token_s))
        parts.append(f"first token after {times}")
    mine, theirs = loss_of(winner), loss_of(row)
    if mine is not None and theirs is not None:
        parts.append(f"KL {_against(significant(mine), significant(theirs))}")
    return "; ".join(parts)


def _against(one: str, other: str) -> str:
    return f"the same {one}" if one == other else f"{one} against {other}"


def place_text(place: int, ranking: Sequence[Scored], weights: Weights, yardstick: Yardstick) -> str:
    """The score of a place as the sum that it is, and its distance to the place before."""
    entry = ranking[place]
    facts, gains = [], []
    if weights.size > 0:
        facts.append(_size_text(entry.row))
        gains.append(f"{_weight(weights.size)} x {entry.size:.2f}")
    if weights.speed > 0 and entry.speed is not None:
        facts.append(_speed_text(entry, yardstick))
        gains.append(f"{_weight(weights.speed)} x {entry.speed:.2f}")
    loss = loss_of(entry.row)
    facts.append(f"KL {significant(loss)}" if loss else "no loss")
    text = f"{'; '.join(facts)}. Score {' + '.join(gains)}"
    if weights.loss > 0:
        text += f"{' ' if gains else ''}- {_weight(weights.loss)} x {entry.loss:.2f}"
    text += f" = {signed(entry.score)}"
    if place > 0:
        before = ranking[place - 1]
        text += f", {significant(before.score - entry.score, 2)} behind {before.row.name}"
    return text


def choice_reasons(
    ranking: Sequence[Scored], scenario: Scenario, weights: Weights, constraints: Constraints, yardstick: Yardstick
) -> list[str]:
    """Why the first row is first."""
    best = ranking[0]
    reasons = [f"Asked for: {constraints}."] if str(constraints) else []
    if len(ranking) > 1:
        second = ranking[1]
        behind = significant(best.score - second.score, 2)
        reasons.append(
            f"{best.row.name} has the best score for the {scenario} scenario, {signed(best.score)}; {second.row.name} "
            f"follows, {behind} behind."
        )
    else:
        reasons.append(f"{best.row.name} is the only row left for the {scenario} scenario; every other is excluded.")
    if best.row.recipe is None:
        reasons.append("It is the unquantized model: nothing quantized serves this scenario better here.")
    reasons.append(f"Size: {_size_text(best.row)}.")
    reasons.append("Speed: not measured." if best.speed is None else f"Speed: {_speed_text(best, yardstick)}.")
    if best.row.recipe is not None:
        reasons.append(_loss_text(best.row, constraints, yardstick))
    reasons += _circumstances(best.row, constraints)
    reasons.append(_rule_text(weights))
    return reasons


def _circumstances(row: Row, constraints: Constraints) -> list[str]:
    """What else was asked for, which tool made the row, and whether its speed is to be doubted."""
    found = []
    if constraints.max_memory is not None and row.peak_rss_bytes is not None:
        found.append(f"Memory: {bytes_text(row.peak_rss_bytes)} at its peak.")
    if constraints.min_agreement is not None and row.recipe is not None and row.top1_agreement is not None:
        found.append(
            f"Agreement: {percent_text(row.top1_agreement)} of its likeliest tokens are the unquantized model's."
        )
    if row.tool is not None:
        tool = row.tool
        found.append(
            f"Made by {tool.name} {tool.version} ({tool.licence}), measured in {tool.runtime}; loads in "
            f"{', '.join(tool.targets)}."
        )
    if row.foreign_load is not None and row.foreign_load > FOREIGN_LIMIT:
        found.append(
            f"Its speed is uncertain: other programs kept {significant(row.foreign_load, 2)} processors busy meanwhile."
        )
    return found


def nothing_text(
    rows: Sequence[Row], misses: Mapping[int, Sequence[Miss]], constraints: Constraints, refused: Mapping[int, str]
) -> str:
    """Why there is no choice, and which row comes nearest to the limits."""
    if not misses:
        place = min(refused)
        return f"No row has the numbers that this scenario weighs; {rows[place].name}, for one: {refused[place]}."

    def distance(place: int) -> tuple[float, float, str]:
        loss = loss_of(rows[place])
        total = sum(miss.doublings for miss in misses[place])
        return total, math.inf if loss is None else loss, rows[place].name

    nearest = min(misses, key=distance)
    default = "the default ceiling of the loss" if constraints.max_loss is None else ""
    text = f"No row keeps within every limit ({'; '.join(filter(None, [str(constraints), default]))}). "
    text += f"{rows[nearest].name} comes nearest: {refused[nearest]}."
    if constraints.max_loss is None:
        only_loss = [place for place in misses if [miss.limit for miss in misses[place]] == ["loss"]]
        if only_loss:
            place = min(only_loss, key=distance)
            needed = math.ceil((loss_of(rows[place]) or 0.0) * 1000) / 1000
            text += f" {rows[place].name} misses only the ceiling of the loss; to accept it, allow {needed:.3f}."
    return text


def _weight(value: float) -> str:
    """A weight as a simple fraction where it is one: 2/3, 1/4, 0.37."""
    simple = Fraction(value).limit_denominator(12)
    return str(simple) if abs(simple - Fraction(value)) < 1e-9 else significant(value)


def _size_text(row: Row) -> str:
    size, change = bytes_text(row.bytes), percent_text(abs(row.compression))
    if change == "0.0 %":
        return f"{size}, the size of bf16"
    return f"{size}, {change} {'smaller' if row.compression > 0 else 'larger'} than bf16"


def _speed_text(entry: Scored, yardstick: Yardstick) -> str:
    row, parts = entry.row, []
    if (decode := positive(row.decode_tokens_per_s)) is not None:
        parts.append(f"decodes {significant(decode)} tokens/s")
    if (first := positive(row.time_to_first_token_s)) is not None:
        parts.append(f"first token after {seconds_text(first)}")
    text = ", ".join(parts)
    if entry.speed is not None and row.recipe is not None:
        slower = "unquantized model" if yardstick.unquantized else "slowest row"
        text += f", {2**entry.speed:.2f} times the speed of the {slower}"
    return text


def _loss_text(row: Row, constraints: Constraints, yardstick: Yardstick) -> str:
    text = f"Loss: KL {significant(loss_of(row) or 0.0)} nats a token"
    if row.kl_ci95 is not None:
        text += f" (95 % interval {significant(row.kl_ci95[0])} to {significant(row.kl_ci95[1])})"
    ceiling = yardstick.loss_ceiling(row)
    if constraints.max_loss is None and ceiling is not None:
        text += f"; an unquantized model of this size would lose {significant(ceiling)}"
    return text + "."


def _rule_text(weights: Weights) -> str:
    gains = []
    if weights.size > 0:
        gains.append(f"{_weight(weights.size)} of the halvings of size")
    if weights.speed > 0:
        gains.append(f"{_weight(weights.speed)} of the doublings of speed")
    text = f"Score = {' + '.join(gains)}"
    if weights.loss > 0:
        loss = f"{_weight(weights.loss)} of the halvings of an unquantized model that would lose as much"
        text += f"{' ' if gains else ''}- {loss}"
    return f"{text}."
