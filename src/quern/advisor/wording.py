"""The sentences of a recommendation. Every one of them carries the figures that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from quern.advisor.constraints import Constraints, memory_of
from quern.advisor.deployment import runtime_of, runtime_target
from quern.advisor.drift import favour, favour_text, group_speed_of
from quern.advisor.scoring import Scored, Weights, Yardstick, loss_of, positive
from quern.core.results import DRIFT_LIMIT, FOREIGN_LIMIT, Row, Scenario, Target
from quern.core.text.language import gettext
from quern.core.text.units import bytes_text, percent_text, processors_text, seconds_text, signed, significant


def dominated_text(row: Row, winner: Row, *, first_token: bool) -> str:
    """That ``winner`` is better than ``row``, with the figures of both."""
    figures = figures_against(row, winner, first_token=first_token)
    return gettext(
        "dominated by {winner}, which is no larger, no slower and no less accurate: {figures}",
        winner=winner.name,
        figures=figures,
    )


def figures_against(row: Row, winner: Row, *, first_token: bool) -> str:
    """The figures of ``winner``, each beside that of ``row``."""
    parts = [_against(bytes_text(winner.bytes), bytes_text(row.bytes))]
    if winner.decode_tokens_per_s and row.decode_tokens_per_s:
        rates = _against(significant(winner.decode_tokens_per_s), significant(row.decode_tokens_per_s))
        parts.append(gettext("decodes {rate} tokens/s", rate=rates))
    if first_token and winner.time_to_first_token_s and row.time_to_first_token_s:
        times = _against(seconds_text(winner.time_to_first_token_s), seconds_text(row.time_to_first_token_s))
        parts.append(gettext("first token after {time}", time=times))
    mine, theirs = loss_of(winner), loss_of(row)
    if mine is not None and theirs is not None:
        parts.append(f"KL {_against(significant(mine), significant(theirs))}")
    return gettext("; ").join(parts)


def _against(one: str, other: str) -> str:
    if one == other:
        return gettext("the same {figure}", figure=one)
    return gettext("{figure} against {other}", figure=one, other=other)


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
    facts.append(f"KL {significant(loss)}" if loss else gettext("no loss"))
    text = gettext("{facts}. Score {sum}", facts=gettext("; ").join(facts), sum=" + ".join(gains))
    if weights.loss > 0:
        text += f"{' ' if gains else ''}- {_weight(weights.loss)} x {entry.loss:.2f}"
    text += f" = {signed(entry.score)}"
    if place > 0:
        before = ranking[place - 1]
        behind = significant(before.score - entry.score, 2)
        text += gettext(", {distance} behind {name}", distance=behind, name=before.row.name)
    return text


def elsewhere_text(row: Row, target: Target | None) -> str:
    """That the wanted runtime is not the one whose figures these are; empty where it is, or none was asked for."""
    if target is None or runtime_target(row) == target:
        return ""
    return gettext("; measured in {runtime}, {target} was not measured", runtime=runtime_of(row), target=target)


def choice_reasons(
    ranking: Sequence[Scored], scenario: Scenario, weights: Weights, constraints: Constraints, yardstick: Yardstick
) -> list[str]:
    """Why the first row is first."""
    best = ranking[0]
    reasons = [gettext("Asked for: {limits}.", limits=constraints)] if str(constraints) else []
    if len(ranking) > 1:
        second = ranking[1]
        behind = significant(best.score - second.score, 2)
        reasons.append(
            gettext(
                "{name} has the best score for the {scenario} scenario, {score}; {second} follows, {distance} behind.",
                name=best.row.name,
                scenario=scenario,
                score=signed(best.score),
                second=second.row.name,
                distance=behind,
            )
        )
        if weights.speed > 0:
            reasons += _unsettled(best.row, second.row)
    else:
        reasons.append(
            gettext(
                "{name} is the only row left for the {scenario} scenario; every other is excluded.",
                name=best.row.name,
                scenario=scenario,
            )
        )
    if best.row.kind == "unquantized":
        reasons.append(gettext("It is the unquantized model: nothing quantized serves this scenario better here."))
    reasons.append(gettext("Size: {size}.", size=_size_text(best.row)))
    if best.speed is None:
        reasons.append(gettext("Speed: not measured."))
    else:
        reasons.append(gettext("Speed: {speed}.", speed=_speed_text(best, yardstick)))
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
    return [
        gettext(
            "Which of {one} and {other} is faster is not settled: {why}, and it leads by {lead}.",
            one=one.name,
            other=other.name,
            why=favour_text(faster, slower),
            lead=percent_text(lead),
        )
    ]


def _circumstances(row: Row, constraints: Constraints) -> list[str]:
    """What else was asked for, which tool made the row, and whether its speed is to be doubted."""
    found = []
    if constraints.max_memory is not None and (memory := memory_of(row, constraints.context)) is not None:
        found.append(
            gettext("Memory: {size} at its peak{context}.", size=bytes_text(memory), context=constraints.with_context)
        )
    if constraints.min_agreement is not None and row.kind != "unquantized" and row.top1_agreement is not None:
        found.append(
            gettext(
                "Agreement: {share} of its likeliest tokens are the unquantized model's.",
                share=percent_text(row.top1_agreement),
            )
        )
    if row.tool is not None:
        tool = row.tool
        found.append(
            gettext(
                "Made by {tool} {version} ({licence}), measured in {runtime}; loads in {targets}.",
                tool=tool.name,
                version=tool.version,
                licence=tool.licence,
                runtime=tool.runtime,
                targets=gettext(", ").join(tool.targets),
            )
        )
    if elsewhere_text(row, constraints.target):
        found.append(
            gettext(
                "Its speed and memory were measured in {runtime}; {target} was not measured, so nothing shows how fast it "
                "is there.",
                runtime=runtime_of(row),
                target=constraints.target,
            )
        )
    if abs((group := group_speed_of(row)) - 1) > DRIFT_LIMIT:
        found.append(
            gettext(
                "While it was timed, the unquantized model decoded at {share} of its speed in the first group: by so much "
                "its speed is not comparable with that of rows of other groups.",
                share=significant(group),
            )
        )
    if row.foreign_load is not None and row.foreign_load > FOREIGN_LIMIT:
        found.append(
            gettext(
                "Its speed is uncertain: other programs kept {processors} busy meanwhile.",
                processors=processors_text(row.foreign_load),
            )
        )
    return found


def _weight(value: float) -> str:
    """A weight as a simple fraction where it is one: 2/3, 1/4, 0.37."""
    simple = Fraction(value).limit_denominator(12)
    return str(simple) if abs(simple - Fraction(value)) < 1e-9 else significant(value)


def _size_text(row: Row) -> str:
    size, change = bytes_text(row.bytes), percent_text(abs(row.compression))
    if change == "0.0 %":
        return gettext("{size}, the size of bf16", size=size)
    if row.compression > 0:
        return gettext("{size}, {change} smaller than bf16", size=size, change=change)
    return gettext("{size}, {change} larger than bf16", size=size, change=change)


def _speed_text(entry: Scored, yardstick: Yardstick) -> str:
    row, parts = entry.row, []
    if (decode := positive(row.decode_tokens_per_s)) is not None:
        parts.append(gettext("decodes {rate} tokens/s", rate=significant(decode)))
    if (first := positive(row.time_to_first_token_s)) is not None:
        parts.append(gettext("first token after {time}", time=seconds_text(first)))
    if entry.speed is not None and row.kind != "unquantized":
        factor = f"{2**entry.speed:.2f}"
        parts.append(
            gettext("{factor} times the speed of the unquantized model", factor=factor)
            if yardstick.unquantized
            else gettext("{factor} times the speed of the slowest row", factor=factor)
        )
    return gettext(", ").join(parts)


def _loss_text(row: Row, constraints: Constraints, yardstick: Yardstick) -> str:
    text = gettext("Loss: KL {loss} nats a token", loss=significant(loss_of(row) or 0.0))
    if row.kl_ci95 is not None:
        low, high = map(significant, row.kl_ci95)
        text += gettext(" (95 % interval {low} to {high})", low=low, high=high)
    ceiling = yardstick.loss_ceiling(row)
    if constraints.max_loss is None and ceiling is not None and (loss_of(row) or 0.0) > ceiling:
        text += (
            gettext("; an unquantized model of this size would lose only {loss}", loss=significant(ceiling))
            if ceiling > 0
            else gettext("; it is no smaller than bf16")
        )
        text += gettext(", but up to {limit} a loss is small", limit=significant(yardstick.small_loss or 0.0))
    elif constraints.max_loss is None and ceiling is not None:
        text += gettext("; an unquantized model of this size would lose {loss}", loss=significant(ceiling))
    return text + gettext(".")


def _rule_text(weights: Weights) -> str:
    gains = []
    if weights.size > 0:
        gains.append(gettext("{weight} of the halvings of size", weight=_weight(weights.size)))
    if weights.speed > 0:
        gains.append(gettext("{weight} of the doublings of speed", weight=_weight(weights.speed)))
    rule = " + ".join(gains)
    if weights.loss > 0:
        loss = gettext(
            "{weight} of the halvings of an unquantized model that would lose as much", weight=_weight(weights.loss)
        )
        rule += f"{' ' if gains else ''}- {loss}"
    return gettext("Score = {rule}.", rule=rule)
