"""How fast and how long a model runs, from bytes, operations and rates: every figure with its formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quern.advisor.forecasting.results import Basis, Foretold
from quern.core.text.units import bytes_text, significant


@dataclass(frozen=True)
class Part:
    """Weights of one kind, and how fast they are gone through."""

    name: str
    bytes: int
    """That one token reads."""
    rate: float
    """Bytes/s."""
    why: str
    """What the rate rests on."""


def decode(parts: list[Part], cache_bytes: int, cache_rate: float, basis: Basis) -> Foretold:
    """Tokens/s of one text: every part is read once a token, and the keys and values of the text so far."""
    seconds = sum(part.bytes / part.rate for part in parts) + cache_bytes / cache_rate
    terms = [
        f"{bytes_text(part.bytes)} ({part.name}) / {significant(part.rate / 1e9)} GB/s [{part.why}]" for part in parts
    ]
    terms.append(f"{bytes_text(cache_bytes)} (keys and values) / {significant(cache_rate / 1e9)} GB/s")
    said = f"1 / ({' + '.join(terms)})"
    return Foretold(value=1 / seconds, unit="tokens/s", basis=basis, derivation=said)


def prefill(operations: int, rate: float, why: str, basis: Basis) -> Foretold:
    """Tokens/s of a prompt, whose blocks take so many operations a token at ``rate`` operations/s."""
    said = f"{significant(rate / 1e9)} Gop/s [{why}] / {significant(operations / 1e9)} Gop a token"
    return Foretold(value=rate / operations, unit="tokens/s", basis=basis, derivation=said)


def run_memory(base: int, weights: int, cache_bytes: int, context: int, base_name: str, basis: Basis) -> Foretold:
    """Bytes while it runs, with the keys and values of ``context`` tokens."""
    total = base + weights + cache_bytes
    said = (
        f"{base_name} {bytes_text(base)} + weights {bytes_text(weights)} + keys and values of {context} tokens "
        f"{bytes_text(cache_bytes)} = {bytes_text(total)}"
    )
    return Foretold(value=total, unit="bytes", basis=basis, derivation=said)


def contexts(
    room: int, base: int, weights: int, each: Mapping[str, int], most: int, basis: Basis
) -> dict[str, Foretold]:
    """By precision of keys and values: the longest text that fits ``room`` bytes, at most what the model reads."""
    found = {}
    left = room - base - weights
    for name, size in each.items():
        said = f"({bytes_text(room)} - {bytes_text(base)} - weights {bytes_text(weights)}) / {size:,} bytes a token"
        fits = max(0, left // size) if size else most
        if left <= 0:
            said += f": {bytes_text(-left)} too little"
        elif fits > most:
            said += f" = {fits:,}, and the model reads {most:,}"
        found[name] = Foretold(value=min(fits, most), unit="tokens", basis=basis, derivation=said)
    return found
