"""The tools view of the page: what each row was made with, its place, filters by tool, runtime and licence, failures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from quern.advisor.deployment import has_other_tools, licence_of, maker_of, runtime_of, targets_of, targets_text
from quern.advisor.placement import KINDS, Placement, placements
from quern.core.results import Results, Row
from quern.core.text.language import gettext
from quern.core.text.units import bytes_text, seconds_text
from quern.report.provenance import limits_text, model_name
from quern.report.wording import STAGES, load_text, protocol_text, scale_text, tool_text, under_foreign_load


def has_tools_view(results: Results) -> bool:
    """Whether other tools took part, or tried to."""
    return has_other_tools(results.rows) or bool(results.failures)


def tools_view(results: Results) -> dict[str, Any] | None:
    """What the template needs beside the rows; None without other tools."""
    if not has_tools_view(results):
        return None
    rows = results.rows
    makers = [maker[0] for row in rows if (maker := maker_of(row, results.quern_version))]
    return {
        "filters": [
            _filter("tool", gettext("Tool"), makers),
            _filter("target", gettext("Loads in"), (target for row in rows for target in targets_of(row))),
            _filter("licence", gettext("Licence"), (licence for row in rows if (licence := licence_of(row)))),
        ],
        "scale": scale_text(rows),
        "protocol": protocol_text(results.protocol, results.rows) if results.protocol else "",
        "failures": [
            {"name": f.name, "tool": f.tool, "stage": gettext(STAGES[f.stage]), "reason": f.reason}
            for f in results.failures
        ],
        "file_name": re.sub(r"[^\w.-]+", "-", f"quern-{model_name(results)}").strip("-"),
    }


def _filter(key: str, label: str, values: Iterable[str]) -> dict[str, Any]:
    return {"key": key, "label": label, "values": sorted(set(values), key=str.casefold)}


def tool_rows(results: Results) -> list[dict[str, Any]]:
    """For each row, in their order: maker, licence, runtimes, place, and the lines of its provenance."""
    found = []
    for row, placed in zip(results.rows, placements(results.rows), strict=True):
        maker = maker_of(row, results.quern_version)
        found.append(
            {
                "tool": maker[0] if maker else "",
                "version": maker[1] if maker else "",
                "licence": licence_of(row) or "",
                "runtime": runtime_of(row),
                "targets": list(targets_of(row)),
                "place": placed.label,
                "by": placed.by or "",
                "kind": placed.kind,
                "rank": KINDS.index(placed.kind),
                "reason": placed.reason,
                "foreign": load_text(row) if under_foreign_load(row) else "",
                "provenance": list(_provenance(row, placed, results.quern_version)),
            }
        )
    return found


def _provenance(row: Row, placed: Placement, quern_version: str) -> Iterable[tuple[str, str]]:
    """Name and text of what a reader has to know about one row."""
    yield gettext("Made by"), tool_text(row, quern_version) or gettext("nobody: the checkpoint as it is")
    if licence := licence_of(row):
        yield gettext("Licence"), licence
    yield gettext("Ran in"), runtime_of(row)
    yield gettext("Loads in"), targets_text(row)
    reason = placed.reason
    if placed.kind != "dominated":
        reason = gettext("{place}: {reason}", place=placed.label, reason=reason)
    yield gettext("Place"), reason
    if row.recipe is not None:
        yield gettext("Settings"), _settings(row.recipe)
    if row.quantize_seconds is not None:
        peak = row.quantize_peak_rss_bytes
        memory = gettext(", {size} of memory at the peak", size=bytes_text(peak)) if peak is not None else ""
        yield gettext("Quantized in"), seconds_text(row.quantize_seconds) + memory
    if limits := limits_text(row):
        yield gettext("Limits"), limits
    if row.artifact_sha256 is not None:
        yield gettext("Artifact SHA-256"), row.artifact_sha256
    for note in row.notes:
        yield gettext("Note"), note


def _settings(recipe: dict[str, Any]) -> str:
    """Another tool's own settings; of quern's rows the name of the recipe, which stands in full further down."""
    if "peer" in recipe:
        settings = recipe.get("settings", {})
        return json.dumps(settings, ensure_ascii=False) if settings else str(recipe.get("name", ""))
    return str(recipe.get("description") or recipe.get("name", ""))
