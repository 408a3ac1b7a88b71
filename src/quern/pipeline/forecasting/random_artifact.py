"""Artifacts of random codes: what an engine reads has the sizes and the layout of a recipe's, but no meaning.

Nothing is quantized, so they are made about as fast as they are written; for timing alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from quern.architectures.base import architecture_of
from quern.checkpoint.safetensors_file import write_safetensors
from quern.codecs.base import codec_of
from quern.codecs.trellis import TrellisCodec
from quern.core.recipe import Recipe
from quern.formats.quern import QuernWriter
from quern.pipeline.blockwise.job import plan_of


def write_random_artifact(folder: Path, config: dict[str, Any], recipe: Recipe, seed: int = 0) -> Path:
    """An artifact of ``recipe`` for the model that ``config`` (a config.json) describes, in the new folder ``folder``."""
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
                tensors[name] = random_weight(shapes[name], generator)
                continue
            rows, columns = shapes[name]
            codec = codec_of(plan[module].scheme)
            for part, (size, dtype) in codec.part_shapes((rows, columns)).items():
                tensors[f"{module}.{part}"] = _random_part(part, size, dtype, columns, generator)
            if isinstance(codec, TrellisCodec):  # sums of random entries would not fit the bytes that kernels add in
                tensors[f"{module}.table"] = codec.table.entries.clone()
            if plan[module].rotation is not None:
                tensors[f"{module}.input_signs"] = torch.zeros(-(-columns // 8), dtype=torch.uint8)
            if plan[module].activations.mode == "static":
                tensors[f"{module}.input_scale"] = torch.tensor(0.05)
        file = f"model-{shard}.safetensors"
        write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    quantization = QuernWriter(recipe, plan, architecture).quantization_config(plan)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}), "utf-8")
    return folder


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for a vector, else bf16 numbers from N(0, 1/columns)."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    result = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, shape[0], 1024):
        rows = result[start : start + 1024]
        rows.copy_(torch.randn(rows.shape, generator=generator) / shape[1] ** 0.5)
    return result


def _random_part(
    part: str, size: tuple[int, ...], dtype: torch.dtype, columns: int, generator: torch.Generator
) -> torch.Tensor:
    if part == "scale":
        return torch.full(size, 0.01 / columns**0.5, dtype=dtype)
    flat = torch.empty(size, dtype=dtype).view(-1).view(torch.uint8)
    return flat.random_(0, 256, generator=generator).view(dtype).view(size).clone()
