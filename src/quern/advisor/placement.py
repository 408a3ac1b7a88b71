"""Where each row stands on the scale that quantization tools are usually told apart by, and the figures that put it there.

- **A**: over 80 % smaller than the bf16 checkpoint.
- **B**: fastest at small loss.
- **C**: between the two, on the Pareto front of size, decode speed and KL.
- **A, B and C at once**: over 80 % smaller and fastest at small loss.
- Whatever another row dominates stands nowhere on it, whatever its size: that row serves better.

*Small loss* means a KL of at most 1 % of the unquantized model's cross entropy H (nats a token), or the noise floor where
that is higher. On text that the model itself would write, the cross entropy of the quantized model is H + KL, so 1 % is
by how much it predicts worse; MLPerf Inference asks the same of quantized models, 99 % of the reference's accuracy. By the
scaling law of ``quern.advisor.scoring`` it is what an unquantized model of 12 % fewer parameters would lose. A fixed KL or
a fixed top-1 agreement would not do: the same KL is much for a model that is sure of every token and nothing for one that
is not.

*Fastest* means: decodes more tokens/s than every other row of small loss, or does not differ from the fastest by more than
repeats do, or by no more than the machine ran faster for the fastest (``as_fast``); and faster than the
unquantized model, or quantizing has gained no speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from quern.advisor.drift import favour, favour_text
from quern.advisor.scoring import Yardstick, as_fast, dominators, loss_of, missing_figures, positive
from quern.advisor.wording import figures_against
from quern.core.results import Row, unquantized_row
from quern.core.text.language import gettext, ngettext, translatable
from quern.core.text.units import bytes_text, percent_text, significant

SMALL = 0.8
"""Compression above which a row is placed at A."""

Kind = Literal["A, B and C", "A", "B", "C", "dominated", "unquantized", "not placed"]
KINDS: tuple[Kind, ...] = (
    translatable("A, B and C"),
    "A",
    "B",
    "C",
    translatable("dominated"),
    translatable("unquantized"),
    translatable("not placed"),
)
"""In the order in which a table sorts them."""


@dataclass(frozen=True)
class Placement:
    """The place of one row, with the reason."""

    kind: Kind
    reason: str
    """Names the figures."""
    by: str | None = None
    """The row that dominates it."""

    @property
    def label(self) -> str:
        """The place in a few words."""
        return gettext("dominated by {name}", name=self.by) if self.kind == "dominated" else gettext(self.kind)


def small_loss_limit(rows: Sequence[Row]) -> float | None:
    """KL in nats a token up to which the loss is small; None where no perplexity was measured."""
    return Yardstick.of(rows).small_loss if rows else None


def placements(rows: Sequence[Row]) -> list[Placement]:
    """The place of every row, in their order."""
    if not rows:
        return []
    beaten, missing = dominators(rows, first_token=False), missing_figures(rows)
    if_steady = dominators(rows, first_token=False, with_drift=False)
    fastest = _Fastest.of(rows)
    found = []
    for place, row in enumerate(rows):
        winner = rows[beaten[place]] if place in beaten else None
        if row.kind == "unquantized":
            found.append(_unquantized(row, winner))
        elif missing[place]:
            lacking = [gettext(figure) for figure in missing[place]]
            reason = ngettext(
                "its {figures} was not measured",
                "its {figures} were not measured",
                len(lacking),
                figures=gettext(" and its ").join(lacking),
            )
            found.append(Placement("not placed", reason))
        elif winner is not None:
            found.append(Placement("dominated", _dominated(row, winner), by=winner.name))
        else:
            spared = rows[if_steady[place]] if place in if_steady else None
            found.append(_on_the_front(row, rows, fastest, spared))
    return found


@dataclass(frozen=True)
class _Fastest:
    """The rows of small loss, and the one of them that decodes fastest."""

    limit: float | None
    count: int
    row: Row | None
    """None where none is faster than the unquantized model."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Fastest:
        limit, reference = small_loss_limit(rows), unquantized_row(rows)
        small = [
            row
            for row in rows
            if row.kind != "unquantized"
            and limit is not None
            and (loss := loss_of(row)) is not None
            and loss <= limit
            and positive(row.decode_tokens_per_s) is not None
        ]
        best = max(small, key=lambda row: row.decode_tokens_per_s or 0.0, default=None)
        if best is not None and reference is not None and as_fast(reference, best):
            best = None
        return cls(limit, len(small), best)

    def includes(self, row: Row) -> bool:
        """Whether ``row`` is the fastest at small loss, or no slower than it as far as can be told."""
        loss = loss_of(row)
        return (
            self.row is not None
            and loss is not None
            and self.limit is not None
            and loss <= self.limit
            and as_fast(row, self.row)
        )

    def reason(self, row: Row) -> str:
        """Why ``row`` is included."""
        speed = significant(row.decode_tokens_per_s or 0.0)
        if self.row is None or row.name == self.row.name:
            first = gettext(
                "decodes {rate} tokens/s, fastest of the {count} of small loss", rate=speed, count=self.count
            )
        else:
            told = {"rate": speed, "name": self.row.name, "best": significant(self.row.decode_tokens_per_s or 0.0)}
            first = (
                gettext(
                    "decodes {rate} tokens/s, which cannot be told from {name} ({best}), the fastest of small loss: {why}",
                    **told,
                    why=favour_text(self.row, row),
                )
                if favour(self.row, row) > 0
                else gettext(
                    "decodes {rate} tokens/s, within the rounds of {name} ({best}), the fastest of small loss", **told
                )
            )
        loss, limit = significant(loss_of(row) or 0.0), significant(self.limit or 0.0)
        return gettext("{speed}: KL {loss} of at most {limit}", speed=first, loss=loss, limit=limit)


def _on_the_front(row: Row, rows: Sequence[Row], fastest: _Fastest, spared: Row | None) -> Placement:
    """``spared``: the row that would dominate it if the machine had run at one speed throughout."""
    placed = _placed(row, rows, fastest, spared is not None)
    if spared is None:
        return placed
    why = (
        favour_text(spared, row)
        if favour(spared, row) > 0
        else gettext("rows that it is compared with were timed while the machine ran faster")
    )
    doubt = gettext("{name} may dominate it, which the speeds do not settle: {why}", name=spared.name, why=why)
    return Placement(placed.kind, gettext("; ").join((placed.reason, doubt)))


def _placed(row: Row, rows: Sequence[Row], fastest: _Fastest, in_doubt: bool) -> Placement:
    sizes = {"size": bytes_text(row.bytes), "change": percent_text(abs(row.compression))}
    smaller = (
        gettext("{size}, {change} smaller than bf16", **sizes)
        if row.compression >= 0
        else gettext("{size}, {change} larger than bf16", **sizes)
    )
    small, fast = row.compression > SMALL, fastest.includes(row)
    if small and fast:
        return Placement("A, B and C", gettext("; ").join((smaller, fastest.reason(row))))
    if fast:
        return Placement("B", gettext("; ").join((fastest.reason(row), smaller)))
    parts = [smaller]
    if (decode := positive(row.decode_tokens_per_s)) is not None:
        parts.append(gettext("decodes {rate} tokens/s", rate=significant(decode)))
    loss, ceiling = loss_of(row), Yardstick.of(rows).loss_ceiling(row)
    if loss is not None:
        parts.append(f"KL {significant(loss)}")
        if ceiling is not None and loss > ceiling:
            parts[-1] += gettext(
                ", more than the {loss} that an unquantized model of this size would lose", loss=significant(ceiling)
            )
    if not small and not in_doubt:
        parts.append(gettext("no row is at once no larger, no slower and no less accurate"))
    return Placement("A" if small else "C", gettext("; ").join(parts))


def _unquantized(row: Row, winner: Row | None) -> Placement:
    facts = [gettext("the model as it is: {size}", size=bytes_text(row.bytes))]
    if (decode := positive(row.decode_tokens_per_s)) is not None:
        facts.append(gettext("decodes {rate} tokens/s", rate=significant(decode)))
    if winner is not None:
        facts.append(_dominated(row, winner))
    return Placement("unquantized", gettext("; ").join(facts), by=winner.name if winner else None)


def _dominated(row: Row, winner: Row) -> str:
    figures = figures_against(row, winner, first_token=False)
    return gettext("dominated by {name}: {figures}", name=winner.name, figures=figures)
