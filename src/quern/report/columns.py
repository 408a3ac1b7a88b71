"""The measured quantities as the report shows them: label, unit, direction, format, and where a row holds each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from quern.core.results import Results, Row
from quern.core.units import bytes_text, limit_text, percent_text, seconds_text, significant
from quern.report.provenance import prefill_fraction
from quern.report.tools import has_tools_view

Kind = Literal["bytes", "number", "percent", "seconds"]
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One quantity. ``kind`` tells the page's own formatter how to write axis ticks."""

    key: str
    label: str
    unit: str
    help: str
    better: Literal["low", "high"]
    kind: Kind
    value: Callable[[Row], float | None]
    digits: int = 3
    detail: Callable[[Row], list[str]] = lambda row: []
    """Lines below the value."""
    range: Callable[[Row], Range | None] = lambda row: None
    against_reference: bool = False
    """Whether it compares with the reference, which then cannot be best in it."""

    def text(self, row: Row) -> str | None:
        """The value with its unit where the unit depends on the size, else without; None where not measured."""
        value = self.value(row)
        if value is None:
            return None
        writers: dict[Kind, Callable[[float], str]] = {
            "bytes": bytes_text,
            "number": lambda number: significant(number, self.digits),
            "percent": percent_text,
            "seconds": seconds_text,
        }
        return writers[self.kind](value)


def _spread(key: str) -> Callable[[Row], Range | None]:
    def read(row: Row) -> Range | None:
        spread = (row.speed_spread or {}).get(key)
        return (spread.low, spread.high) if spread else None

    return read


def _between(limits: Range | None, writer: Callable[[float], str]) -> list[str]:
    """One line "low to high", with a unit that both share written once; no line without limits."""
    if limits is None:
        return []
    low, high = writer(limits[0]), writer(limits[1])
    number, _, unit = low.partition(" ")
    return [f"{number if unit == high.partition(' ')[2] else low} to {high}"]


def _rate_detail(key: str, fraction: Callable[[Row], float | None]) -> Callable[[Row], list[str]]:
    read = _spread(key)

    def detail(row: Row) -> list[str]:
        share = fraction(row)
        return _between(read(row), significant) + ([limit_text(share)] if share is not None else [])

    return detail


def _prefill_detail(row: Row) -> list[str]:
    """As of any rate; a tool that does not declare its arithmetic has no limit to be compared with."""
    lines = _rate_detail("prefill_tokens_per_s", prefill_fraction)(row)
    undeclared = row.tool is not None and row.prefill_tokens_per_s is not None and prefill_fraction(row) is None
    return [*lines, "- of limit"] if undeclared else lines


def _smaller(row: Row) -> list[str]:
    if row.kind == "unquantized":
        return []
    return [f"{percent_text(abs(row.compression))} {'less' if row.compression >= 0 else 'more'}"]


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def _choice_detail(row: Row) -> list[str]:
    if row.choice_difference is None:
        return []
    return [f"{_points(row.choice_difference)} points", *_between(row.choice_difference_ci95, _points)]


COLUMNS: tuple[Column, ...] = (
    Column(
        key="size",
        label="Size",
        unit="",
        help="Bytes on disk of the whole artifact, and how much smaller that is than the bf16 checkpoint",
        better="low",
        kind="bytes",
        value=lambda row: row.bytes,
        detail=_smaller,
    ),
    Column(
        key="bits",
        label="Bits per weight",
        unit="",
        help="8 x bytes of weight data / number of weights, counted from the file",
        better="low",
        kind="number",
        value=lambda row: row.bits_per_weight,
    ),
    Column(
        key="kl",
        label="KL divergence",
        unit="nats/token",
        help="Mean KL divergence from the unquantized model's predictions, with its 95 % interval",
        better="low",
        kind="number",
        value=lambda row: row.kl_mean,
        detail=lambda row: _between(row.kl_ci95, significant),
        range=lambda row: row.kl_ci95,
        against_reference=True,
    ),
    Column(
        key="perplexity",
        label="Perplexity",
        unit="",
        help="On the scored text",
        better="low",
        kind="number",
        digits=4,
        value=lambda row: row.perplexity,
    ),
    Column(
        key="top1",
        label="Top-1 agreement",
        unit="",
        help="Share of tokens whose likeliest prediction is the unquantized model's",
        better="high",
        kind="percent",
        value=lambda row: row.top1_agreement,
        against_reference=True,
    ),
    Column(
        key="choice",
        label="Choice accuracy",
        unit="",
        help="Share of items answered correctly; below it the paired difference to the unquantized model",
        better="high",
        kind="percent",
        value=lambda row: row.choice_accuracy,
        detail=_choice_detail,
    ),
    Column(
        key="decode",
        label="Decode",
        unit="tokens/s",
        help="Median over interleaved rounds; below it the range, and the share of the machine's read bandwidth",
        better="high",
        kind="number",
        value=lambda row: row.decode_tokens_per_s,
        detail=_rate_detail("decode_tokens_per_s", lambda row: row.decode_limit_fraction),
        range=_spread("decode_tokens_per_s"),
    ),
    Column(
        key="prefill",
        label="Prefill",
        unit="tokens/s",
        help="Median over interleaved rounds; below it the range, and the share of the machine's matrix product rate in "
        "the arithmetic used (-: not declared)",
        better="high",
        kind="number",
        value=lambda row: row.prefill_tokens_per_s,
        detail=_prefill_detail,
        range=_spread("prefill_tokens_per_s"),
    ),
    Column(
        key="first",
        label="First token",
        unit="",
        help="Time to the first token of an answer; below it the range over the rounds",
        better="low",
        kind="seconds",
        value=lambda row: row.time_to_first_token_s,
        detail=lambda row: _between(_spread("time_to_first_token_s")(row), seconds_text),
        range=_spread("time_to_first_token_s"),
    ),
    Column(
        key="memory",
        label="Peak memory",
        unit="",
        help="Largest resident memory of the process group while it ran",
        better="low",
        kind="bytes",
        value=lambda row: row.peak_rss_bytes,
    ),
    Column(
        key="energy",
        label="Energy",
        unit="J/token",
        help="Of decoding one token",
        better="low",
        kind="number",
        value=lambda row: row.energy_joules_per_token,
    ),
    Column(
        key="quantize",
        label="Time to quantize",
        unit="",
        help="Wall time of making the artifact",
        better="low",
        kind="seconds",
        value=lambda row: row.quantize_seconds,
    ),
)

QUANTIZE_MEMORY = Column(
    key="quantize_memory",
    label="Memory to quantize",
    unit="",
    help="Largest resident memory of the process group while it made the artifact",
    better="low",
    kind="bytes",
    value=lambda row: row.quantize_peak_rss_bytes,
)
"""Only beside other tools, whose needs differ."""


def columns_of(results: Results) -> tuple[Column, ...]:
    """The columns that these results may fill."""
    return (*COLUMNS, QUANTIZE_MEMORY) if has_tools_view(results) else COLUMNS
