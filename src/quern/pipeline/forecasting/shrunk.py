"""Smaller models of the same widths, or the same proportions, that short runs are made with."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.safetensors_file import write_safetensors
from quern.pipeline.forecasting.random_artifact import random_weight

_DIVIDED = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")
_LISTED = ("layer_types", "no_rope_layers", "mlp_only_layers")


def shrunk(config: dict[str, Any], *, layers: int, vocabulary: int, divisor: int = 1) -> dict[str, Any]:
    """``config`` with its first ``layers`` blocks, so many tokens, and widths divided by ``divisor``; heads keep theirs."""
    found = copy.deepcopy(config)
    known = {"hidden_size": config["hidden_size"], "heads": config["num_attention_heads"]}
    found.setdefault("head_dim", known["hidden_size"] // known["heads"])
    found |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    found["pad_token_id"] = None
    for key in _DIVIDED:
        if isinstance(found.get(key), int):
            found[key] = max(1, found[key] // divisor)
    if isinstance(found.get("num_key_value_heads"), int):
        found["num_key_value_heads"] = math.gcd(found["num_attention_heads"], found["num_key_value_heads"])
    for key in _LISTED:
        if isinstance(found.get(key), list):
            found[key] = found[key][:layers]
    return found


def weights_of(architecture: Architecture) -> int:
    """Of the linears of the first block."""
    return sum(linear.shape[0] * linear.shape[1] for linear in architecture.block(0).linears)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each byte."""
    symbols = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(symbols, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_random_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A folder with random weights, a shard for each block, and a tokenizer of bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_tokenizer(folder)
    shapes = architecture_of(config).expected_shapes()
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: random_weight(shape, generator) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
