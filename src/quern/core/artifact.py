"""What an artifact in quern's own format says of itself in config.json; writers and readers share these names."""

from __future__ import annotations

from typing import Any

from quern.core.errors import UserError
from quern.core.recipe import WeightScheme

METHOD = "quern"
"""``quant_method`` of quern's own format."""
VERSION = 1
"""``format_version``; docs/format.md describes it byte for byte."""
PROVENANCE = "quern.json"
"""File with what the artifact was made from and what rounding cost."""


def module_schemes(config: dict[str, Any]) -> dict[str, WeightScheme]:
    """Every quantized module's scheme from a ``quantization_config``. Raises ``UserError`` for another version."""
    version = config.get("format_version")
    if version != VERSION:
        raise UserError(
            f"the artifact has quern format version {version!r}; this quern reads version {VERSION}. "
            "Install the quern that wrote it, or quantize the checkpoint again"
        )
    try:
        return {module: WeightScheme.model_validate(scheme) for module, scheme in config["modules"].items()}
    except (KeyError, AttributeError, ValueError) as error:
        raise UserError(f"the artifact's quantization_config is damaged: {error}") from None
