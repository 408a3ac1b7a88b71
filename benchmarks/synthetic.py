"""Random checkpoints of a given shape, for benchmarks of time and memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from quern.architectures.base import architecture_of
from quern.checkpoint.safetensors_file import write_safetensors
from quern.pipeline.forecasting.random_artifact import random_weight

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = 320
"""The bytes, and room for the special tokens that tokenizer classes add."""


def tokens_of(vocabulary: int) -> list[str]:
    """The bytes, and words that no text has: what a model of random weights writes with so many tokens is text at once."""
    return [*BYTES, *(f"\u0120t{index}" for index in range(len(BYTES), vocabulary))]


def write_tokenizer(folder: Path, vocabulary: int = len(BYTES)) -> None:
    """A tokenizer with one token for each byte, and others that it only decodes."""
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(tokens_of(vocabulary))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_checkpoint(
    folder: Path, *, hidden: int, intermediate: int, heads: int, key_value_heads: int, layers: int, seed: int = 0
) -> Path:
    """A Qwen2-shaped checkpoint of bf16 weights drawn from N(0, 1/inputs), a shard for each block."""
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    write_tokenizer(folder)
    shapes = architecture_of(json.loads((folder / "config.json").read_text("utf-8"))).expected_shapes()
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for shard in range(layers + 1):
        names = [n for n in shapes if (f".layers.{shard}." in n if shard < layers else ".layers." not in n)]
        tensors = {name: random_weight(shapes[name], generator) for name in names}
        weight_map |= dict.fromkeys(names, f"shard-{shard}.safetensors")
        write_safetensors(folder / f"shard-{shard}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder
