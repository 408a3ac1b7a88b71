"""What an artifact in quern's own format says of itself in config.json; writers and readers share these names."""

from __future__ import annotations

from typing import Any

from quern.core.errors import UserError
from quern.core.recipe import WeightScheme

METHOD = "quern"
"""``quant_method`` of quern's own format."""
VERSION = 2
"""``format_version`` that is written; docs/format.md describes it byte for byte."""
READ_VERSIONS = (1, 2)
"""Versions that are read: 1 had neither trellis codes nor rotations."""
PROVENANCE = "quern.json"
"""File with what the artifact was made from and what rounding cost."""
INPUT_SCALE = "input_scale"
"""Last part of a tensor's name: the scale of static activations."""
INPUT_SIGNS = "input_signs"
"""The packed signs of the rotation that a module's inputs want."""


def in_block(module: str) -> bool:
    """Whether a module lies in a decoder block, where inputs may be quantized and rotated."""
    return ".layers." in module


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """``quantization_config`` of a config.json, None where there is none. Raises ``UserError`` if it is no object."""
    found = config.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise UserError(f"config.json: quantization_config is {str(found)[:40]!r}; it must be an object")
    return found


def module_schemes(config: dict[str, Any]) -> dict[str, WeightScheme]:
    """Every quantized module's scheme from a ``quantization_config``. Raises ``UserError`` for another version."""
    version = config.get("format_version")
    if version not in READ_VERSIONS:
        known = " and ".join(map(str, READ_VERSIONS))
        raise UserError(
            f"the artifact has quern format version {version!r}; this quern reads versions {known}. "
            "Install the quern that wrote it, or quantize the checkpoint again"
        )
    try:
        return {module: WeightScheme.model_validate(scheme) for module, scheme in config["modules"].items()}
    except (KeyError, AttributeError, ValueError) as error:
        raise UserError(f"the artifact's quantization_config is damaged: {error}") from None
