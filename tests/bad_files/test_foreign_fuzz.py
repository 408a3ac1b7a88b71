"""Random damage to what other tools packed: a weight is decoded to the shape that was announced, or refused; nothing else."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import VARIANTS, write_mxfp4
from safetensors.torch import load_file
from torch import Tensor

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.foreign.decoded import decoded, foreign_weights
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo
from quern.core.errors import UserError

ROUNDS = 200
JUNK = [
    None, True, False, 0, -1, 1, 3, 16, 2**31, 2**63, 1e300, "", "int", "group", [], [1], [0, 0], [2**40, 1], {}, {"a": 1},
]  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Memory:
    """Tensors that lie in no file."""

    tensors: dict[str, Tensor]

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return ()

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(NAMES[t.dtype], tuple(t.shape), 0, t.nbytes) for name, t in self.tensors.items()}

    def place(self, name: str) -> Path:
        return Path("memory")

    def plain(self, name: str) -> bool:
        return True

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()


def packed(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A quantization_config and the tensors of one module."""
    if name == "mxfp4":
        write_mxfp4(folder)
        return {"quant_method": "mxfp4"}, load_file(folder / "model.safetensors")
    parts, _ = VARIANTS[name].pack((32, 64), np.random.default_rng(0))
    return VARIANTS[name].config, {f"model.layers.0.mlp.up_proj.{part}": value for part, value in parts.items()}


def damage_config(config: dict[str, Any], random: np.random.Generator) -> None:
    """One value anywhere in it becomes another, or goes."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(config)
    container, key = places[random.integers(len(places))]
    if random.integers(5) == 0:
        del container[key]
    else:
        container[key] = copy.deepcopy(JUNK[random.integers(len(JUNK))])


def longer(value: Tensor, random: np.random.Generator) -> Tensor:
    return torch.cat([value.reshape(-1), value.reshape(-1)])


def shorter(value: Tensor, random: np.random.Generator) -> Tensor:
    return value.reshape(-1)[: int(random.integers(0, value.numel() + 1))].clone()


def turned(value: Tensor, random: np.random.Generator) -> Tensor:
    return value.T.contiguous() if value.dim() == 2 else value[None]


def other_bits(value: Tensor, random: np.random.Generator) -> Tensor:
    raw = value.reshape(-1).view(torch.uint8).clone()
    if raw.numel():
        at = random.integers(0, raw.numel(), int(random.integers(1, 9)))
        raw[torch.from_numpy(at)] = torch.from_numpy(random.integers(0, 256, at.size).astype(np.uint8))
    return raw.view(value.dtype).view(value.shape)


def other_dtype(value: Tensor, random: np.random.Generator) -> Tensor:
    known = [dtype for dtype in DTYPES.values() if dtype != torch.bool]
    dtype = known[random.integers(len(known))]
    raw = value.reshape(-1).view(torch.uint8)
    return raw[: raw.numel() // dtype.itemsize * dtype.itemsize].clone().view(dtype)


DAMAGE: tuple[Callable[[Tensor, np.random.Generator], Tensor], ...] = (longer, shorter, turned, other_bits, other_dtype)


def damaged(
    config: dict[str, Any], tensors: dict[str, Tensor], random: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = copy.deepcopy(config), dict(tensors)
    for _ in range(random.integers(1, 4)):
        name = sorted(tensors)[random.integers(len(tensors))]
        kind = random.integers(10)
        if kind < 3:
            method = config["quant_method"]
            damage_config(config, random)
            config["quant_method"] = method
        elif kind == 3 and len(tensors) > 1:
            del tensors[name]
        else:
            tensors[name] = DAMAGE[random.integers(len(DAMAGE))](tensors[name], random)
    return config, tensors


@pytest.mark.parametrize("name", [*VARIANTS, "mxfp4"])
def test_damage_is_decoded_or_refused(name, tmp_path):
    config, tensors = packed(name, tmp_path)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    outcomes = {"decoded": 0, "refused": 0}
    for turn in range(ROUNDS):
        now, parts = damaged(config, tensors, random)
        said = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": now}
        try:
            checkpoint = decoded(Checkpoint(Path("memory"), said, Memory(parts)))
            for weight in foreign_weights(checkpoint).values():
                info = checkpoint.info(weight.name)
                stored = sum(parts[part].nbytes for part in weight.parts)
                assert info.elements <= 16 * stored, "more numbers than bits could say"
                value = checkpoint.read(weight.name)
                assert (tuple(value.shape), NAMES[value.dtype]) == (info.shape, info.dtype)
            outcomes["decoded"] += 1
        except UserError as error:
            assert len(str(error)) < 2000
            outcomes["refused"] += 1
        except Exception as error:
            shapes = {part: (str(value.dtype), tuple(value.shape)) for part, value in parts.items()}
            raise AssertionError(f"turn {turn}: {json.dumps(now)} {shapes}") from error
    assert min(outcomes.values()) > ROUNDS // 50, outcomes
