"""Whether a checkpoint holds the tensors that its configuration calls for: names, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from quern.architectures.base import Architecture, Shapes
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.head import EMBEDDING, HEAD
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo
from quern.core.text.language import gettext

FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
"""Dtypes of weights that are not quantized."""
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


@dataclass(frozen=True)
class Expected:
    """One tensor."""

    shape: tuple[int, ...]
    dtypes: frozenset[torch.dtype] = FLOATS
    """Those that it may have."""


def plain(shapes: Shapes) -> dict[str, Expected]:
    """Tensors that are not quantized."""
    return {name: Expected(tuple(shape)) for name, shape in shapes.items()}


def differences(checkpoint: Checkpoint, architecture: Architecture, wanted: Mapping[str, Expected]) -> list[str]:
    """Clauses about tensors that are missing, left over, or of another shape or dtype."""
    infos = checkpoint.source.infos
    problems = surplus(set(infos) - set(wanted), architecture, infos)
    problems += [gettext("tensor {name!r} is missing", name=name) for name in sorted(set(wanted) - set(infos))]
    for name in sorted(set(wanted) & set(infos)):
        problems += misfit(name, infos[name], wanted[name])
    return problems


def misfit(name: str, info: TensorInfo, wanted: Expected) -> list[str]:
    """What is wrong with one tensor."""
    if info.shape != wanted.shape:
        told = {"name": name, "shape": info.shape, "wanted": wanted.shape}
        return [gettext("tensor {name!r} has shape {shape}, the config calls for {wanted}", **told)]
    if DTYPES[info.dtype] not in wanted.dtypes:
        named = ", ".join(sorted(key for key, dtype in DTYPES.items() if dtype in wanted.dtypes))
        told = {"name": name, "dtype": info.dtype, "wanted": named}
        return [gettext("tensor {name!r} has dtype {dtype}; there it must be {wanted}", **told)]
    return []


def surplus(left_over: Iterable[str], architecture: Architecture, infos: Mapping[str, TensorInfo]) -> list[str]:
    """Of tensors that nothing calls for: those that the model has no place for; layers beyond its last in one clause."""
    names = [name for name in sorted(left_over) if not _harmless(name, architecture, infos)]
    layers = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    problems = []
    if layers and (last := max(layers)) >= architecture.layers:
        beyond = {name for name in names if (m := _LAYER.match(name)) and int(m[1]) >= architecture.layers}
        told = {"layers": architecture.layers, "count": last + 1}
        problems.append(gettext("the config says num_hidden_layers {layers}, the weights have {count} layers", **told))
        names = [name for name in names if name not in beyond]
    return problems + [gettext("tensor {name!r} is not part of such a model", name=name) for name in names]


def _harmless(name: str, architecture: Architecture, infos: Mapping[str, TensorInfo]) -> bool:
    """Old checkpoints' rotary frequencies, which models compute themselves, and a head that repeats the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and architecture.tied and EMBEDDING in infos)
