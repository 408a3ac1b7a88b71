"""Speed of generating: tokens a second after the first one."""

from __future__ import annotations

from quern.evaluation.measures._passes import over_rounds, rate_detail, time_round
from quern.evaluation.measures.base import measure

measure(
    name="decode",
    title="Decode",
    help="Tokens generated a second after the first, median over interleaved rounds; below it the range, and the share of "
    "the machine's read bandwidth",
    unit="tokens/s",
    better="high",
    place=90,
    stage="rounds",
    run=time_round,
    summarize=over_rounds(lambda each: each.decode_tokens / each.decode_s, "tokens/s"),
    field="decode_tokens_per_s",
    detail=rate_detail("decode_tokens_per_s", lambda row: row.decode_limit_fraction),
    heading="decode tok/s",
    form=".1f",
)
