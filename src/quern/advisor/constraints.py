"""What a user insists on, and by how much a row misses it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from quern.advisor.deployment import licence_of, obstacle_to, targets_of, targets_text
from quern.advisor.scoring import Yardstick, loss_of, positive
from quern.core.errors import UserError, option
from quern.core.results import Row, Target
from quern.core.text.language import gettext
from quern.core.text.suggest import did_you_mean
from quern.core.text.units import bytes_text, percent_text, significant

USUAL_LICENCES = ("MIT", "Apache-2.0", "BSD-3-Clause", "LGPL-3.0-only", "GPL-3.0-only", "AGPL-3.0-only")
"""What one may have meant who named no identifier of the SPDX list."""


@dataclass(frozen=True)
class Miss:
    """A limit that a row does not keep."""

    limit: Literal["size", "memory", "speed", "agreement", "target", "licence", "loss"]
    text: str
    doublings: float
    """log2 of the ratio between the row's number and the limit (of the disagreement with the unquantized model, where
    agreement is limited); infinite when the limit is 0, and where ``by_degree`` is false."""
    by_degree: bool = True
    """False when not measured, and where there is nothing between yes and no: such a row comes near to nothing."""


def memory_of(row: Row, context: int | None) -> int | None:
    """Bytes of peak memory, with the keys and values of ``context`` tokens; None where one of the two was not measured.

    The peak holds those of the timed rounds already, some hundred tokens, so the sum is an upper bound.
    """
    if row.peak_rss_bytes is None or context is None:
        return row.peak_rss_bytes
    cache = row.figures.get("cache")
    return None if cache is None else row.peak_rss_bytes + round(context * cache.value)


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """Limits on what may be recommended; None where nothing was said. Raises ``UserError`` for what is no limit."""

    max_size: int | None = None
    """Bytes on disk."""
    max_memory: int | None = None
    """Bytes of peak resident memory while it runs."""
    context: int | None = None
    """Tokens of a text whose keys and values count to that memory."""
    max_loss: float | None = None
    """Mean KL divergence in nats a token. Without it, the default ceiling of each row holds."""
    min_agreement: float | None = None
    """Top-1 agreement, a fraction."""
    min_speed: float | None = None
    """Decode tokens/s."""
    target: Target | None = None
    """The runtime that has to load it."""
    licences: tuple[str, ...] | None = None
    """SPDX identifiers of which the tool's licence has to be one."""

    def __post_init__(self) -> None:
        for name, value, zero_allowed in (
            (gettext("max size (bytes)"), self.max_size, False),
            (gettext("max memory (bytes)"), self.max_memory, False),
            (gettext("max loss (nats a token)"), self.max_loss, True),
            (gettext("min speed (tokens/s)"), self.min_speed, False),
        ):
            if value is not None and not (math.isfinite(value) and (value > 0 or (zero_allowed and value == 0))):
                told = {"name": name, "value": value}
                if zero_allowed:
                    raise UserError(gettext("{name} must be a finite number of at least 0; got {value}", **told))
                raise UserError(gettext("{name} must be a finite number above 0; got {value}", **told))
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise UserError(
                gettext(
                    "min agreement must be a fraction from 0 to 1, such as 0.95; got {min_agreement}",
                    min_agreement=self.min_agreement,
                )
            )
        if self.context is not None and (self.context < 1 or self.max_memory is None):
            raise UserError(
                gettext(
                    "{tokens} counts to {memory}: give both, and at least one token; got {context} tokens",
                    tokens=option("context", "--context"),
                    memory=option("max_memory", "--max-memory"),
                    context=self.context,
                )
            )
        if self.target is not None and self.target not in get_args(Target):
            raise UserError(
                gettext(
                    "unknown target runtime {target!r}; known ones: {known}{hint}",
                    target=self.target,
                    known=", ".join(get_args(Target)),
                    hint=did_you_mean(self.target, get_args(Target)),
                )
            )
        if self.licences is not None and not all(licence.strip() for licence in self.licences or ("",)):
            raise UserError(
                gettext("licences must name at least one SPDX identifier, such as Apache-2.0, and no empty one")
            )
        for licence in self.licences or ():
            try:
                canonicalize_license_expression(licence)
            except InvalidLicenseExpression:
                raise UserError(
                    gettext(
                        "{licence!r} is no SPDX identifier of a licence, such as {known}{hint}",
                        licence=licence,
                        known=", ".join(USUAL_LICENCES),
                        hint=did_you_mean(licence, USUAL_LICENCES),
                    )
                ) from None

    @property
    def with_context(self) -> str:
        """What the memory is taken with, after it in a sentence."""
        if self.context is None:
            return ""
        return gettext(" with {tokens} tokens of context", tokens=self.context)

    def __str__(self) -> str:
        parts = []
        if self.max_size is not None:
            parts.append(gettext("size at most {size}", size=bytes_text(self.max_size)))
        if self.max_memory is not None:
            memory = {"context": self.with_context, "size": bytes_text(self.max_memory)}
            parts.append(gettext("peak memory{context} at most {size}", **memory))
        if self.max_loss is not None:
            parts.append(gettext("KL at most {loss}", loss=significant(self.max_loss)))
        if self.min_agreement is not None:
            parts.append(gettext("top-1 agreement at least {share}", share=percent_text(self.min_agreement)))
        if self.min_speed is not None:
            parts.append(gettext("decode speed at least {rate} tokens/s", rate=significant(self.min_speed)))
        if self.target is not None:
            parts.append(gettext("loads in {target}", target=self.target))
        if self.licences is not None:
            parts.append(gettext("licence {licences}", licences=gettext(" or ").join(self.licences)))
        return gettext(", ").join(parts)

    def misses(self, row: Row, yardstick: Yardstick, *, small_loss_passes: bool = False) -> Iterator[Miss]:
        """Every limit that ``row`` does not keep.

        With ``small_loss_passes`` the default ceiling of the loss lets through what loses little, whatever its size.
        """
        if self.max_size is not None and row.bytes > self.max_size:
            yield Miss("size", *_too_many_bytes(row.bytes, self.max_size))
        if self.max_memory is not None:
            yield from self._memory_miss(row, self.max_memory)
        if self.min_speed is not None:
            yield from self._speed_miss(positive(row.decode_tokens_per_s), self.min_speed)
        if self.min_agreement is not None and row.kind != "unquantized":
            yield from self._agreement_miss(row.top1_agreement, self.min_agreement)
        if self.target is not None and self.target not in targets_of(row):
            loads = {"target": self.target, "targets": targets_text(row)}
            text = gettext("does not load in {target}; it loads in {targets}", **loads)
            if why := obstacle_to(row, self.target):
                text += f" ({why})"
            yield Miss("target", text, math.inf, by_degree=False)
        if self.licences is not None:
            yield from self._licence_miss(row, self.licences)
        yield from self._loss_miss(row, yardstick, (yardstick.small_loss or 0.0) if small_loss_passes else 0.0)

    def _memory_miss(self, row: Row, most: int) -> Iterator[Miss]:
        memory = memory_of(row, self.context)
        if memory is None:
            size = bytes_text(most)
            text = (
                gettext("its memory was not measured, so nothing shows that it keeps within {size}", size=size)
                if row.peak_rss_bytes is None
                else gettext(
                    "its key/value cache was not measured, so nothing shows that it keeps within {size}", size=size
                )
            )
            yield Miss("memory", text, math.inf, by_degree=False)
        elif memory > most:
            text, doublings = _too_many_bytes(memory, most)
            text = gettext("peak memory{context} {excess}", context=self.with_context, excess=text)
            yield Miss("memory", text, doublings)

    @staticmethod
    def _speed_miss(decode: float | None, least: float) -> Iterator[Miss]:
        asked = significant(least)
        if decode is None:
            text = gettext(
                "its decode speed was not measured, so nothing shows that it reaches the {asked} tokens/s asked for",
                asked=asked,
            )
            yield Miss("speed", text, math.inf, by_degree=False)
        elif decode < least:
            text = gettext(
                "decodes {rate} tokens/s, {share} below the {asked} tokens/s asked for",
                rate=significant(decode),
                share=percent_text(1 - decode / least),
                asked=asked,
            )
            yield Miss("speed", text, math.log2(least / decode))

    @staticmethod
    def _agreement_miss(agreement: float | None, least: float) -> Iterator[Miss]:
        asked = percent_text(least)
        if agreement is None:
            text = gettext(
                "its top-1 agreement was not measured, so nothing shows that it reaches the {asked} asked for",
                asked=asked,
            )
            yield Miss("agreement", text, math.inf, by_degree=False)
        elif agreement < least:
            text = gettext(
                "top-1 agreement {share} is below the {asked} asked for", share=percent_text(agreement), asked=asked
            )
            yield Miss("agreement", text, math.log2((1 - agreement) / (1 - least)) if least < 1 else math.inf)

    @staticmethod
    def _licence_miss(row: Row, allowed: tuple[str, ...]) -> Iterator[Miss]:
        licence = licence_of(row)
        if licence is not None and licence.casefold() not in {name.strip().casefold() for name in allowed}:
            told = {"licence": licence, "allowed": gettext(", ").join(allowed)}
            text = gettext("its tool's licence is {licence}; allowed: {allowed}", **told)
            yield Miss("licence", text, math.inf, by_degree=False)

    def _loss_miss(self, row: Row, yardstick: Yardstick, passes: float) -> Iterator[Miss]:
        loss = loss_of(row)
        limit = self._loss_limit(row, yardstick, passes)
        if loss is None:
            if self.max_loss is not None:
                text = gettext(
                    "its KL was not measured, so nothing shows that it is at most {loss}",
                    loss=significant(self.max_loss),
                )
                yield Miss("loss", text, math.inf, by_degree=False)
            return
        if limit is None or loss <= limit:
            return
        ratio = loss / limit if limit > 0 else math.inf
        figure = significant(limit)
        if self.max_loss is not None:
            text = gettext("KL {loss} is {beyond}", loss=significant(loss), beyond=_beyond(ratio, _allowed(figure)))
        elif limit == passes > 0:
            text = gettext(
                "KL {loss} is {beyond}, and more than an unquantized model of this size would lose",
                loss=significant(loss),
                beyond=_beyond(ratio, gettext("the {figure} up to which a loss is small", figure=figure)),
            )
        elif limit > 0:
            would_lose = gettext("the {figure} that an unquantized model of this size would lose", figure=figure)
            text = gettext(
                "KL {loss} is {beyond}: a smaller model serves better",
                loss=significant(loss),
                beyond=_beyond(ratio, would_lose),
            )
        else:
            text = gettext(
                "it loses accuracy (KL {loss}) and is no smaller than the bf16 checkpoint", loss=significant(loss)
            )
        yield Miss("loss", text, math.log2(ratio))

    def _loss_limit(self, row: Row, yardstick: Yardstick, passes: float) -> float | None:
        if self.max_loss is not None:
            return self.max_loss
        ceiling = yardstick.loss_ceiling(row)
        return None if ceiling is None else max(ceiling, passes)


def _too_many_bytes(count: int, most: int) -> tuple[str, float]:
    """By how much ``count`` bytes are above ``most``, in words and in doublings."""
    ratio = count / most
    text = gettext(
        "{size} is {beyond} ({excess} too many)",
        size=bytes_text(count),
        beyond=_beyond(ratio, _allowed(bytes_text(most))),
        excess=bytes_text(count - most),
    )
    return text, math.log2(ratio)


def _allowed(figure: str) -> str:
    return gettext("the {figure} allowed", figure=figure)


def _beyond(ratio: float, limit: str) -> str:
    """How far a value is above its ``limit``: 1.22 -> "22.0 % over it", 4.1 -> "4.1 times it"."""
    if math.isinf(ratio):
        return gettext("over {limit}", limit=limit)
    if ratio < 3:
        return gettext("{share} over {limit}", share=percent_text(ratio - 1), limit=limit)
    return gettext("{factor} times {limit}", factor=significant(ratio), limit=limit)
