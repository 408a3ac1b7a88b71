"""What an artifact says of itself, whatever its format."""

from __future__ import annotations

from typing import Any

from quern.core.errors import UserError

PROVENANCE = "quern.json"
"""File with what the artifact was made from and what rounding cost."""


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """``quantization_config`` of a config.json, None where there is none. Raises ``UserError`` if it is no object."""
    found = config.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise UserError(f"config.json: quantization_config is {str(found)[:40]!r}; it must be an object")
    return found
