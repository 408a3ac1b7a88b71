"""Which of the measured rows to use, for a scenario and under constraints, with the reason for every place.

Scenarios:

- ``storage``: many copies or little memory. Score = 2/3 size gain - 1/3 loss.
- ``speed``: real-time translation, voice, customer service. Score = 2/3 speed gain - 1/3 loss.
- ``overall``: all three alike. Score = 1/3 size gain + 1/3 speed gain - 1/3 loss.
- ``mix``: as the user weighs them.

Size gain is in halvings of bytes against the bf16 checkpoint; speed gain is the mean of the doublings of decode speed
and of 1 / time to first token against the unquantized model in the engine that decodes it fastest; loss is in halvings of
an unquantized model that would lose as much (``quern.advisor.scoring`` says how). That unquantized model scores 0.

Before rows are scored, those are excluded that miss a constraint; that, unless a largest loss is given, lose more than
an unquantized model of their size would (the default ceiling: what is small but broken cannot win; where speed counts, or
a target runtime leaves nothing else, a small loss passes it at any size); that lack a number which the scenario weighs;
and that another row dominates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from quern.advisor.constraints import Constraints, Miss
from quern.advisor.machine import measured_on
from quern.advisor.no_choice import no_choice_text
from quern.advisor.scoring import WEIGHTS, Scored, Weights, Yardstick, dominators, pareto_front
from quern.advisor.wording import choice_reasons, dominated_text, elsewhere_text, place_text
from quern.core.errors import UserError
from quern.core.results import FORMER_SCENARIOS, Excluded, Ranked, Recommendation, Results, Row, Scenario, Target
from quern.core.text.language import gettext
from quern.core.text.suggest import did_you_mean

__all__ = ["pareto_front", "recommend"]


def recommend(
    results_or_rows: Results | Sequence[Row],
    scenario: Scenario,
    *,
    weights: Mapping[str, float] | None = None,
    max_size: int | None = None,
    max_memory: int | None = None,
    context: int | None = None,
    max_loss: float | None = None,
    min_agreement: float | None = None,
    min_speed: float | None = None,
    target: Target | None = None,
    licences: Sequence[str] | None = None,
) -> Recommendation:
    """Rank the measured rows for ``scenario`` and choose the first.

    The unquantized reference takes part like any other row, with a loss of 0. Only numbers of the rows are used;
    a number that no row has does not count.

    Args:
        results_or_rows: What ``quern compare`` wrote, or its rows (at least one).
        scenario: ``storage``, ``speed``, ``overall`` (once called ``balanced``) or ``mix``.
        weights: What ``size``, ``speed`` and ``loss`` count in ``mix`` (and only there), in any unit; 0 if left out.
        max_size: Largest size on disk in bytes.
        max_memory: Largest peak resident memory in bytes while it runs.
        context: Tokens of a text whose key/value cache counts to that memory.
        max_loss: Largest mean KL divergence in nats a token; it takes the place of the default ceiling.
        min_agreement: Least top-1 agreement with the unquantized model, a fraction.
        min_speed: Least decode speed in tokens/s.
        target: The runtime that has to load it.
        licences: SPDX identifiers of the licences that the tool may have. No tool made the unquantized model.

    Returns:
        Every row either in ``ranking``, best first, or in ``excluded``, both with the reason. ``choice`` is None when
        nothing is left; ``reasons`` then names the row that comes nearest, by how much it misses, and the least lossy
        one with what to change. ``measured_on`` names the machine where whole results were given.

    Raises:
        UserError: No rows, an unknown scenario or target, weights that do not go with the scenario, or a limit that is
            not a positive finite number.
    """
    rows = list(results_or_rows.rows if isinstance(results_or_rows, Results) else results_or_rows)
    if not rows:
        raise UserError(gettext("there is nothing to recommend: the results hold no rows; run `quern compare` first"))
    scenario = FORMER_SCENARIOS.get(scenario, scenario)
    counted = weights_of(scenario, weights)
    constraints = Constraints(
        max_size=max_size,
        max_memory=max_memory,
        context=context,
        max_loss=max_loss,
        min_agreement=min_agreement,
        min_speed=min_speed,
        target=target,
        licences=None if licences is None else tuple(licences),
    )
    answer = _ranked(rows, scenario, counted, constraints)
    if isinstance(results_or_rows, Results):
        answer.measured_on = measured_on(results_or_rows)
    return answer


def weights_of(scenario: Scenario, parts: Mapping[str, float] | None) -> Weights:
    """What counts how much in a scenario. Raises ``UserError`` for an unknown one, and for weights that do not fit it."""
    if scenario not in get_args(Scenario):
        known = get_args(Scenario)
        raise UserError(
            gettext(
                "unknown scenario {scenario!r}; known ones: {known}{hint}",
                scenario=scenario,
                known=", ".join(known),
                hint=did_you_mean(scenario, known),
            )
        )
    if scenario == "mix":
        if parts is None:
            raise UserError(gettext("the scenario mix needs weights; give them, such as size=1,speed=2,loss=1"))
        return Weights.mix(parts)
    if parts is not None:
        raise UserError(
            gettext(
                "the scenario {scenario} brings its own weights; to give others, choose the scenario mix",
                scenario=scenario,
            )
        )
    return WEIGHTS[scenario]


def _ranked(rows: Sequence[Row], scenario: Scenario, weights: Weights, constraints: Constraints) -> Recommendation:
    yardstick = Yardstick.of(rows)
    speed_counts = weights.speed > 0
    scored, refused, misses = _sifted(rows, weights, constraints, yardstick, small_loss_passes=speed_counts)
    if not scored and constraints.target is not None and not speed_counts:
        scored, refused, misses = _sifted(rows, weights, constraints, yardstick, small_loss_passes=True)
    places = list(scored)
    for loser, winner in dominators([rows[place] for place in places], first_token=speed_counts).items():
        refused[places[loser]] = dominated_text(
            scored.pop(places[loser]).row, rows[places[winner]], first_token=speed_counts
        )
    ranking = sorted(scored.values(), key=lambda entry: (-entry.score, entry.loss, entry.row.bytes, entry.row.name))
    if ranking:
        reasons = choice_reasons(ranking, scenario, weights, constraints, yardstick)
    else:
        reasons = [no_choice_text(rows, misses, constraints, refused)]
    return Recommendation(
        scenario=scenario,
        weights=weights.to_json(),
        choice=ranking[0].row.name if ranking else None,
        reasons=reasons,
        excluded=[Excluded(name=rows[place].name, reason=refused[place]) for place in sorted(refused)],
        ranking=[
            Ranked(
                name=entry.row.name,
                score=entry.score,
                reason=place_text(place, ranking, weights, yardstick) + elsewhere_text(entry.row, constraints.target),
            )
            for place, entry in enumerate(ranking)
        ],
    )


def _sifted(
    rows: Sequence[Row], weights: Weights, constraints: Constraints, yardstick: Yardstick, *, small_loss_passes: bool
) -> tuple[dict[int, Scored], dict[int, str], dict[int, list[Miss]]]:
    """By place: the rows that may be chosen, why each other one may not, and the limits that it misses."""
    scored: dict[int, Scored] = {}
    refused: dict[int, str] = {}
    misses: dict[int, list[Miss]] = {}
    for place, row in enumerate(rows):
        if missed := list(constraints.misses(row, yardstick, small_loss_passes=small_loss_passes)):
            misses[place] = missed
            refused[place] = gettext("; ").join(miss.text for miss in missed)
        elif isinstance(outcome := _score(row, weights, yardstick), str):
            refused[place] = outcome
        else:
            scored[place] = outcome
    return scored, refused, misses


def _score(row: Row, weights: Weights, yardstick: Yardstick) -> Scored | str:
    """The row with its score, or what it lacks."""
    loss = yardstick.loss_cost(row)
    if loss is None:
        if row.kl_mean is None:
            return gettext("KL was not measured, so its loss is unknown")
        return gettext("no perplexity was measured, so its KL cannot be weighed")
    speed = yardstick.speed_gain(row)
    if speed is None and weights.speed > 0:
        measured_elsewhere = yardstick.decode is not None or yardstick.first_token is not None
        if measured_elsewhere or weights.size == 0:
            return gettext("its speed was not measured")
    size = yardstick.size_gain(row)
    total = weights.size * size + weights.speed * (speed or 0.0) - weights.loss * loss
    return Scored(row, size, speed, loss, total)
