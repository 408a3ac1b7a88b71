"""Sentences about a comparison that the terminal, the page and the documentation share."""

from __future__ import annotations

from collections.abc import Sequence

from quern.advisor.deployment import maker_of
from quern.advisor.placement import SMALL, small_loss_limit
from quern.advisor.scoring import SMALL_LOSS
from quern.core.results import FOREIGN_LIMIT, Protocol, Results, Row
from quern.core.units import processors_text, significant

STAGES: dict[str, str] = {
    "install": "installing it",
    "quantize": "quantizing",
    "load": "loading the artifact",
    "measure": "measuring",
}
"""Where a row failed, in words."""


def tool_text(row: Row, quern_version: str) -> str:
    """Name and version of the tool that made the row; empty for the unquantized model."""
    return " ".join(maker_of(row, quern_version) or ())


def scale_text(rows: Sequence[Row]) -> str:
    """What the places mean, with the limit that holds for these rows."""
    limit = small_loss_limit(rows)
    small = f"KL at most {significant(limit)}" if limit is not None else "not known here, for want of a perplexity"
    return (
        f"A: over {round(100 * SMALL)} % smaller than bf16. B: fastest at small loss ({small}, {round(100 * SMALL_LOSS)} % "
        "of the unquantized model's cross entropy or the noise floor). C: on the Pareto front of size, decode speed and "
        "KL, between the two. Dominated: another row is no worse in all three and better in one; where the machine ran "
        "faster while that row was timed, it leads by more than that."
    )


def protocol_text(protocol: Protocol, rows: Sequence[Row]) -> str:
    """How much was measured and, of a quick run, what that does to the intervals."""
    timed = (
        f"timed a prompt of {protocol.prompt_tokens} tokens and {protocol.decode_tokens} more, "
        f"{_counted(protocol.speed_rounds, 'round')}, {_counted(protocol.threads, 'thread')}"
        if protocol.speed_rounds
        else "speed was left out"
    )
    text = f"Scored {protocol.tokens:,} tokens; {timed}."
    return f"{text} {_quick_text(protocol, rows)}" if protocol.quick else text


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _quick_text(protocol: Protocol, rows: Sequence[Row]) -> str:
    """How much less a quick run can tell."""
    if all(row.kl_ci95 is None for row in rows):
        return "This was a quick run, of too few tokens for intervals."
    return (
        f"This was a quick run: its intervals are about {significant(protocol.interval_factor, 2)} times as wide as those "
        "of the usual number of tokens."
    )


def under_foreign_load(row: Row) -> bool:
    """Whether other programs disturbed the timing of the row."""
    return row.foreign_load is not None and row.foreign_load > FOREIGN_LIMIT


def load_text(row: Row) -> str:
    """How many processors other programs kept busy while the row was timed, in words."""
    return f"{processors_text(row.foreign_load or 0.0)} kept busy by other programs"


def failures_text(results: Results) -> list[str]:
    """One line for each row that could not be made."""
    return [
        f"{failure.name} ({failure.tool}), while {STAGES[failure.stage]}: {failure.reason}"
        for failure in results.failures
    ]
