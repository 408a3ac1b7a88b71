"""Random checkpoints of a given shape, for benchmarks of time and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from quern.architectures.base import architecture_of
from quern.checkpoint.safetensors_file import write_safetensors
from quern.codecs.base import codec_of
from quern.codecs.trellis import TrellisCodec
from quern.core.recipe import Recipe
from quern.formats.quern import QuernWriter
from quern.pipeline.blockwise.job import plan_of

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = 320
"""The bytes, and room for the special tokens that tokenizer classes add."""


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each byte."""
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
        tensors = {name: _random(shapes[name], generator) for name in names}
        weight_map |= dict.fromkeys(names, f"shard-{shard}.safetensors")
        write_safetensors(folder / f"shard-{shard}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    result = torch.empty(shape, dtype=torch.bfloat16)
    for rows in result.split(1024):
        rows.copy_(torch.randn(rows.shape, generator=generator) / shape[1] ** 0.5)
    return result


def write_random_artifact(folder: Path, config: dict[str, Any], recipe: Recipe, seed: int = 0) -> Path:
    """An artifact of ``recipe`` with random codes: what the CPU engine reads has its size and layout, but no meaning.

    ``config`` is a config.json. Nothing is quantized, so a 7B shape takes seconds; for timing only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture = architecture_of(config)
    plan = plan_of(recipe, architecture)
    quantized = plan.quantized()
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shapes = architecture.expected_shapes()
    for shard in range(architecture.layers + 1):
        inside = f".layers.{shard}."
        names = [n for n in shapes if (inside in n if shard < architecture.layers else ".layers." not in n)]
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            module = name.removesuffix(".weight")
            if module not in quantized:
                tensors[name] = _random(shapes[name], generator)
                continue
            rows, columns = shapes[name]
            codec = codec_of(plan[module].scheme)
            for part, (size, dtype) in codec.part_shapes((rows, columns)).items():
                tensors[f"{module}.{part}"] = _random_part(part, size, dtype, columns, generator)
            if isinstance(codec, TrellisCodec):  # sums of random entries would not fit the bytes that kernels add in
                tensors[f"{module}.table"] = codec.table.entries.clone()
            if plan[module].rotation is not None:
                tensors[f"{module}.input_signs"] = torch.zeros(-(-columns // 8), dtype=torch.uint8)
        file = f"model-{shard}.safetensors"
        write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    quantization = QuernWriter(recipe, plan, architecture).quantization_config(plan)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}), "utf-8")
    return folder


def _random_part(
    part: str, size: tuple[int, ...], dtype: torch.dtype, columns: int, generator: torch.Generator
) -> torch.Tensor:
    if part == "scale":
        return torch.full(size, 0.01 / columns**0.5, dtype=dtype)
    flat = torch.empty(size, dtype=dtype).view(-1).view(torch.uint8)
    return flat.random_(0, 256, generator=generator).view(dtype).view(size).clone()
