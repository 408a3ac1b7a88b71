"""The sentences of a recommendation. Every one of them carries the figures that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from quern.advisor.constraints import Constraints, memory_of
from quern.advisor.deployment import runtime_of, runtime_target
from quern.advisor.drift import favour, favour_text, group_speed_of
from quern.advisor.scoring import Scored, Weights, Yardstick, loss_of, positive
from quern.core.results import DRIFT_LIMIT, FOREIGN_LIMIT, Row, Scenario, Target
from quern.core.units import bytes_text, percent_text, processors_text, seconds_text, signed, significant


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


def elsewhere_text(row: Row, target: Target | None) -> str:
    """That the wanted runtime is not the one whose figures these are; empty where it is, or none was asked for."""
    if target is None or runtime_target(row) == target:
        return ""
    return f"; measured in {runtime_of(row)}, {target} was not measured"


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
        if weights.speed > 0:
            reasons += _unsettled(best.row, second.row)
    else:
        reasons.append(f"{best.row.name} is the only row left for the {scenario} scenario; every other is excluded.")
    if best.row.kind == "unquantized":
        reasons.append("It is the unquantized model: nothing quantized serves this scenario better here.")
    reasons.append(f"Size: {_size_text(best.row)}.")
    reasons.append("Speed: not measured." if best.speed is None else f"Speed: {_speed_text(best, yardstick)}.")
    if best.row.kind != "unquantized":
        reasons.append(_loss_text(best.row, constraints, yardstick))
    reasons += _circumstances(best.row, constraints)
    reasons.append(_rule_text(weights))
    return reasons


def _unsettled(one: Row, other: Row) -> list[str]:
    """That the faster of two rows may owe its lead to the machine; nothing where it leads by more than that."""
    faster, slower = sorted((one, other), key=lambda row: row.decode_tokens_per_s or 0.0, reverse=True)
    if not faster.decode_tokens_per_s or not slower.decode_tokens_per_s:
        return []
    lead, favoured = faster.decode_tokens_per_s / slower.decode_tokens_per_s - 1, favour(faster, slower)
    if favoured == 0 or lead > favoured:
        return []
    text = f"Which of {one.name} and {other.name} is faster is not settled: {favour_text(faster, slower)}"
    return [f"{text}, and it leads by {percent_text(lead)}."]


def _circumstances(row: Row, constraints: Constraints) -> list[str]:
    """What else was asked for, which tool made the row, and whether its speed is to be doubted."""
    found = []
    if constraints.max_memory is not None and (memory := memory_of(row, constraints.context)) is not None:
        found.append(f"Memory: {bytes_text(memory)} at its peak{constraints.with_context}.")
    if constraints.min_agreement is not None and row.kind != "unquantized" and row.top1_agreement is not None:
        found.append(
            f"Agreement: {percent_text(row.top1_agreement)} of its likeliest tokens are the unquantized model's."
        )
    if row.tool is not None:
        tool = row.tool
        found.append(
            f"Made by {tool.name} {tool.version} ({tool.licence}), measured in {tool.runtime}; loads in "
            f"{', '.join(tool.targets)}."
        )
    if elsewhere_text(row, constraints.target):
        found.append(
            f"Its speed and memory were measured in {runtime_of(row)}; {constraints.target} was not measured, so nothing "
            "shows how fast it is there."
        )
    if abs((group := group_speed_of(row)) - 1) > DRIFT_LIMIT:
        found.append(
            f"While it was timed, the unquantized model decoded at {significant(group)} of its speed in the first group: "
            "by so much its speed is not comparable with that of rows of other groups."
        )
    if row.foreign_load is not None and row.foreign_load > FOREIGN_LIMIT:
        found.append(f"Its speed is uncertain: other programs kept {processors_text(row.foreign_load)} busy meanwhile.")
    return found


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
    if entry.speed is not None and row.kind != "unquantized":
        slower = "unquantized model" if yardstick.unquantized else "slowest row"
        text += f", {2**entry.speed:.2f} times the speed of the {slower}"
    return text


def _loss_text(row: Row, constraints: Constraints, yardstick: Yardstick) -> str:
    text = f"Loss: KL {significant(loss_of(row) or 0.0)} nats a token"
    if row.kl_ci95 is not None:
        text += f" (95 % interval {significant(row.kl_ci95[0])} to {significant(row.kl_ci95[1])})"
    ceiling = yardstick.loss_ceiling(row)
    if constraints.max_loss is None and ceiling is not None and (loss_of(row) or 0.0) > ceiling:
        smaller = f"an unquantized model of this size would lose only {significant(ceiling)}"
        text += f"; {smaller if ceiling > 0 else 'it is no smaller than bf16'}"
        text += f", but up to {significant(yardstick.small_loss or 0.0)} a loss is small"
    elif constraints.max_loss is None and ceiling is not None:
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
