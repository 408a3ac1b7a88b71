"""Counts in a configuration that no model has: model classes would loop, or allocate, for ever."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quern.core.errors import BadFileError

_LARGEST = {
    "hidden_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": 2**16, "num_attention_heads": 2**16,
    "head_dim": 2**16, "vocab_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1,
    "num_experts": 2**12, "num_local_experts": 2**12, "num_experts_per_tok": 2**12, "moe_intermediate_size": 2**24,
    "shared_expert_intermediate_size": 2**24, "decoder_sparse_step": 2**16,
}  # fmt: skip
"""Far beyond every model."""


def check_counts(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ``BadFileError`` for a ``config`` of ``path`` that counts what no model has."""
    for key, largest in _LARGEST.items():
        count = config.get(key)
        if key in ("head_dim", "sliding_window") and count is None:  # follows from the others; no window
            continue
        if key == "sliding_window" and config.get("use_sliding_window") is False:
            continue
        if key == "num_experts" and count == 0:  # all blocks are dense
            continue
        if key in config and (type(count) is not int or not 0 < count <= largest):
            raise BadFileError(
                path, f"its configuration has {key} {str(count)[:40]}; it must be an integer from 1 to {largest}",
                "Check that config.json belongs to these weights",
            )  # fmt: skip
