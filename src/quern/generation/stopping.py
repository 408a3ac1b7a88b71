"""Which tokens end a text: those that the files name, and what the chat template writes behind an answer.

Chat models are often made from base models whose configuration still names the base's token, so that no single place is
to be trusted: generation ends at any token that one of them names.
"""

from __future__ import annotations

import json
from typing import Any

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json
from quern.core.errors import BadFileError
from quern.texts.turns import turn_end


def end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """The union of what the files name (``named_ends``), the tokenizer's own, and the turn's end.

    Raises ``BadFileError`` where a file names something that is no token.
    """
    ends = (tokenizer.eos_token_id, turn_end(tokenizer))
    return frozenset(named_ends(checkpoint).union(token for token in ends if token is not None))


def named_ends(checkpoint: Checkpoint) -> set[int]:
    """``eos_token_id`` of generation_config.json and of config.json.

    Raises ``BadFileError`` where it is no token, or where generation_config.json is malformed.
    """
    generation = checkpoint.path / "generation_config.json"
    configs = [read_json(generation)] if generation.is_file() else []
    found: set[int] = set()
    for config in (*configs, checkpoint.config):
        named = config.get("eos_token_id")
        tokens = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int for token in tokens):
            raise BadFileError(checkpoint.path, f"eos_token_id is {json.dumps(named)[:80]}, which is no token number")
        found.update(tokens)
    return found
