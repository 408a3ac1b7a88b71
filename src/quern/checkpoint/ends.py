"""Which tokens end an answer, as the files of a checkpoint say it."""

from __future__ import annotations

from typing import Any

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json

GENERATION = "generation_config.json"


def generation_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json says; nothing where there is none. Raises ``BadFileError``."""
    file = checkpoint.path / GENERATION
    return read_json(file) if file.is_file() else {}


def ending_tokens(checkpoint: Checkpoint) -> list[int]:
    """Token numbers that end an answer, as the model's configuration and its defaults of generation say."""
    said: list[Any] = []
    for source in (checkpoint.config, generation_defaults(checkpoint)):
        value = source.get("eos_token_id")
        said += value if isinstance(value, list) else [value]
    return [number for number in dict.fromkeys(said) if type(number) is int]
