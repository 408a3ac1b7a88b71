"""Types of the matrices of a model as short texts: a digit or name for each layer, to hold mixes against llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from tiny_model import tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "qwen2, 8 layers, 4 heads of 2": tiny_config("qwen2", num_hidden_layers=8),
    "llama, 16 layers, 4 heads of 4": tiny_config("llama", num_hidden_layers=16, num_key_value_heads=4),
    "qwen3, 24 layers, 4 heads of 1": tiny_config("qwen3", num_hidden_layers=24, num_key_value_heads=1),
    "mistral, 33 layers, 4 heads of 2": tiny_config("mistral", num_hidden_layers=33),
    "qwen2, 80 layers, 4 heads of 4": tiny_config("qwen2", num_hidden_layers=80, num_key_value_heads=4),
    "llama, 80 layers, 4 heads of 1": tiny_config("llama", num_hidden_layers=80, num_key_value_heads=1),
    "llama, 80 layers, 4 heads of 4": tiny_config("llama", num_hidden_layers=80, num_key_value_heads=4),
    "mixtral, 8 layers, 8 experts": tiny_config("mixtral", num_hidden_layers=8, num_local_experts=8),
    "qwen3_moe, 8 layers, 4 experts": tiny_config("qwen3_moe", num_hidden_layers=8, moe_intermediate_size=256),
}
"""Configurations by what the rules of mixes look at. Rows are whole super-blocks; every other one has a head of its own."""
for number, config in enumerate(MODELS.values()):
    config |= {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "tie_word_embeddings": number % 2 == 0}
    if config["model_type"] in ("llama", "qwen3"):
        config["attention_bias"] = False


def in_short(types: Mapping[str, str]) -> dict[str, str]:
    """Types (``q6_k``) of matrices by llama.cpp's name, as runs of layers for each kind of matrix: ``q6_k x2 q4_k x6``."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name, kind in types.items():
        layer, _, rest = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("0", "", name)
        found.setdefault(rest.removesuffix(".weight"), []).append((int(layer), kind))
    return {name: _runs([kind for _, kind in sorted(kinds)]) for name, kinds in sorted(found.items())}


def _runs(kinds: list[str]) -> str:
    return " ".join(f"{kind} x{len(list(same))}" for kind, same in groupby(kinds))
