"""Recipes and artifacts for tests, small enough to be made by the dozen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quern.core.recipe import Recipe, parse_recipe

TOKENS, LENGTH = 512, 64
INT8 = {"bits": 8, "granularity": "channel", "observer": "min_max"}


def small_recipe(name: str = "test", **choices: Any) -> Recipe:
    """A recipe that calibrates on a few sequences; ``nearest`` and no calibration unless ``rounding`` says otherwise."""
    calibration = {"tokens": TOKENS, "sequence_length": LENGTH, **choices.pop("calibration", {})}
    choices.setdefault("rounding", {"method": "nearest"})
    return parse_recipe({"name": name, "calibration": calibration, **choices}, name)


def make_artifact(
    model: Path, output: Path, text: Path, *, format: str = "quern", threads: int = 1, **choices: Any
) -> Path:
    """Quantize ``model`` by ``small_recipe(**choices)``; the artifact's folder."""
    from quern.pipeline.quantize import quantize

    quantize(model, output, recipe=small_recipe(**choices), calibration=[text], format=format, threads=threads)
    return output


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stored_schemes(folder: Path) -> dict[str, Any]:
    """Every quantized module's scheme, as the artifact says it."""
    from quern.architectures.base import architecture_of
    from quern.formats.base import reader_of

    config = json.loads((folder / "config.json").read_text("utf-8"))
    reader = reader_of(config["quantization_config"], architecture_of(config))
    assert reader is not None
    return {module: stored.scheme for module, stored in reader.plan().items()}


def stored_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
