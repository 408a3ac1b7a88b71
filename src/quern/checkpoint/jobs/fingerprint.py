"""What a job was asked to do, as JSON data: read, and compared with what is asked now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quern.checkpoint.files import read_json
from quern.core.errors import BadFileError, option


def read_fingerprint(path: Path) -> dict[str, Any]:
    """What the file of a fingerprint holds. Nobody has another copy of it."""
    try:
        return read_json(path)
    except BadFileError as error:
        raise BadFileError(path, error.problem, f"Start over with {option('fresh=True', '--fresh')}") from error


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """In which entries two fingerprints differ, a line for each; empty where they are equal."""
    lines = _differences(then, now)
    return "\n  ".join(["What differs (then -> now):", *lines]) if lines else ""


def _differences(then: Any, now: Any, where: str = "") -> list[str]:
    """One line for each leaf in which two fingerprints differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        lines: list[str] = []
        for key in sorted({*then, *now}):
            inner = f"{where}.{key}" if where else key
            lines += _differences(then.get(key, "(absent)"), now.get(key, "(absent)"), inner)
        return lines
    return [] if then == now else [f"{where}: {_brief(then)} -> {_brief(now)}"]


def _brief(value: Any) -> str:
    text = value if value == "(absent)" else json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
