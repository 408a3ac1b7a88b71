"""Speed of reading a prompt: its tokens a second."""

from __future__ import annotations

from quern.core.results import Row
from quern.core.text.language import gettext
from quern.evaluation.measures._passes import over_rounds, rate_detail, time_round
from quern.evaluation.measures.base import measure


def prefill_fraction(row: Row) -> float | None:
    """The share of the machine's limit; None where a tool does not declare its arithmetic, whose rate that would be.

    Files from before rows named that arithmetic hold a share of the float32 rate there, which is no limit.
    """
    return row.prefill_limit_fraction if row.kind != "peer" or row.limit_gemm_dtype is not None else None


def _detail(row: Row) -> list[str]:
    """As of any rate; a tool that does not declare its arithmetic has no limit to be compared with."""
    lines = rate_detail("prefill_tokens_per_s", prefill_fraction)(row)
    undeclared = row.kind == "peer" and row.prefill_tokens_per_s is not None and prefill_fraction(row) is None
    return [*lines, gettext("- of limit")] if undeclared else lines


measure(
    name="prefill",
    title="Prefill",
    help="Tokens of a prompt read a second, median over interleaved rounds; below it the range, and the share of the "
    "machine's matrix product rate in the arithmetic used (-: not declared)",
    unit="tokens/s",
    better="high",
    place=80,
    stage="rounds",
    run=time_round,
    summarize=over_rounds(lambda each: each.prompt_tokens / each.prefill_s, "tokens/s"),
    field="prefill_tokens_per_s",
    detail=_detail,
    heading="prefill tok/s",
    form=".0f",
)
