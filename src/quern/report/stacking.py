"""Which parts of the recipes can be stacked: a table of signs, and every reason once."""

from __future__ import annotations

from typing import Any

from quern.core.results import Results
from quern.core.text.language import gettext

SIGNS = {"works": "+", "degrades": "~", "refuses": "\N{MULTIPLICATION SIGN}"}


def stacking_view(results: Results) -> dict[str, Any] | None:
    """What the template needs; None where nothing is known, or nothing stands beside anything."""
    found = results.stacking
    if found is None or len(found.parts) < 2:
        return None
    known = {(pair.first, pair.second): pair for pair in found.pairs}
    rows = []
    for number, first in enumerate(found.parts, start=1):
        cells = []
        for second in found.parts:
            pair = known.get((first, second))
            label = "same" if first == second else pair.label if pair else "works"
            title = f"{first}, {second}: {gettext(label)}" + (f" - {gettext(pair.reason)}" if pair else "")
            cells.append({"label": label, "sign": SIGNS.get(label, ""), "title": "" if first == second else title})
        rows.append({"number": number, "name": first, "cells": cells})
    return {"rows": rows, "reasons": _reasons(results)}


def _reasons(results: Results) -> list[dict[str, Any]]:
    """Each label and reason with the pairs that it is about, each once; what loses comes first."""
    assert results.stacking is not None
    by_reason: dict[tuple[str, str], list[str]] = {}
    for pair in results.stacking.pairs:
        told = by_reason.setdefault((pair.label, pair.reason), [])
        if _pair(pair.second, pair.first) not in told:
            told.append(_pair(pair.first, pair.second))
    ordered = sorted(by_reason.items(), key=lambda item: item[0][0])
    return [{"label": label, "reason": gettext(reason), "pairs": pairs} for (label, reason), pairs in ordered]


def _pair(first: str, second: str) -> str:
    return gettext("{first} with {second}", first=first, second=second)
