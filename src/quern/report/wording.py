"""Sentences about a comparison that the terminal, the page and the documentation share."""

from __future__ import annotations

from collections.abc import Sequence

from quern.advisor.deployment import maker_of
from quern.advisor.placement import SMALL, small_loss_limit
from quern.advisor.scoring import SMALL_LOSS
from quern.core.results import FOREIGN_LIMIT, Protocol, Results, Row
from quern.core.text.language import gettext, ngettext, translatable
from quern.core.text.units import processors_text, significant

STAGES: dict[str, str] = {
    "install": translatable("installing it"),
    "quantize": translatable("quantizing"),
    "load": translatable("loading the artifact"),
    "measure": translatable("measuring"),
}
"""Where a row failed, in words."""


def tool_text(row: Row, quern_version: str) -> str:
    """Name and version of the tool that made the row; empty for the unquantized model."""
    return " ".join(maker_of(row, quern_version) or ())


def scale_text(rows: Sequence[Row]) -> str:
    """What the places mean, with the limit that holds for these rows."""
    limit = small_loss_limit(rows)
    small = (
        gettext("KL at most {loss}", loss=significant(limit))
        if limit is not None
        else gettext("not known here, for want of a perplexity")
    )
    return gettext(
        "A: over {smaller} % smaller than bf16. B: fastest at small loss ({limit}, {share} % of the unquantized model's "
        "cross entropy or the noise floor). C: on the Pareto front of size, decode speed and KL, between the two. "
        "Dominated: another row is no worse in all three and better in one; where the machine ran faster while that row "
        "was timed, it leads by more than that.",
        smaller=round(100 * SMALL),
        limit=small,
        share=round(100 * SMALL_LOSS),
    )


def protocol_text(protocol: Protocol, rows: Sequence[Row]) -> str:
    """How much was measured and, of a quick run, what that does to the intervals."""
    rounds, threads = protocol.speed_rounds, protocol.threads
    timed = (
        gettext(
            "timed a prompt of {prompt} tokens and {more} more, {rounds}, {threads}",
            prompt=protocol.prompt_tokens,
            more=protocol.decode_tokens,
            rounds=ngettext("{count} round", "{count} rounds", rounds, count=rounds),
            threads=ngettext("{count} thread", "{count} threads", threads, count=threads),
        )
        if rounds
        else gettext("speed was left out")
    )
    text = gettext("Scored {tokens} tokens; {timed}.", tokens=format(protocol.tokens, ","), timed=timed)
    return f"{text} {_quick_text(protocol, rows)}" if protocol.quick else text


def _quick_text(protocol: Protocol, rows: Sequence[Row]) -> str:
    """How much less a quick run can tell."""
    if all(row.kl_ci95 is None for row in rows):
        return gettext("This was a quick run, of too few tokens for intervals.")
    return gettext(
        "This was a quick run: its intervals are about {factor} times as wide as those of the usual number of tokens.",
        factor=significant(protocol.interval_factor, 2),
    )


def under_foreign_load(row: Row) -> bool:
    """Whether other programs disturbed the timing of the row."""
    return row.foreign_load is not None and row.foreign_load > FOREIGN_LIMIT


def load_text(row: Row) -> str:
    """How many processors other programs kept busy while the row was timed, in words."""
    return gettext("{processors} kept busy by other programs", processors=processors_text(row.foreign_load or 0.0))


def failures_text(results: Results) -> list[str]:
    """One line for each row that could not be made."""
    return [
        gettext(
            "{name} ({tool}), while {stage}: {reason}",
            name=failure.name,
            tool=failure.tool,
            stage=gettext(STAGES[failure.stage]),
            reason=failure.reason,
        )
        for failure in results.failures
    ]
