"""Opening a checkpoint for use: its tensors must be those that its configuration calls for.

Every command and engine opens models by ``open_model``, so that one rule holds for all of them: what is missing, left over,
or of another shape or dtype is refused before anything is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.checkpoint.head import EMBEDDING, HEAD
from quern.checkpoint.safetensors_file import DTYPES, TensorInfo
from quern.core.artifact import METHOD, quantization_of
from quern.core.errors import BadFileError, UserError
from quern.core.progress import Progress
from quern.loading import expected
from quern.loading.expected import Expected

COMPRESSED = "compressed-tensors"
_SHOWN = 5
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_COMPRESSED_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale",
)  # fmt: skip
_ROUNDED = ("weight_scale_inv", "weight_scale", "qweight", "qzeros", "scales", "absmax", "SCB", "weight_packed")
"""Ends of names that only quantized checkpoints have."""


def open_model(model: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open a model that is to be used: folder, Hub id, GGUF file or artifact.

    Raises ``UserError`` for what is no model, ``BadFileError`` where tensors and configuration do not fit each other.
    """
    return fitted(open_checkpoint(model, progress=progress))


def fitted(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint``, if its tensors fit its configuration (see ``open_model``).

    What other tools quantized is left to whoever can run it.
    """
    quantization = quantization_of(checkpoint.config)
    method = None if quantization is None else quantization.get("quant_method")
    if method not in (None, METHOD, COMPRESSED):
        return checkpoint
    architecture = architecture_of(checkpoint.config)
    if quantization is None:
        problems = _differences(checkpoint, architecture, expected.unquantized(architecture))
    elif method == METHOD:
        problems = _differences(checkpoint, architecture, expected.artifact(architecture, quantization))
    else:
        problems = _compressed_differences(checkpoint, architecture)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BadFileError(
            checkpoint.path,
            f"config and weights disagree: {'; '.join(problems[:_SHOWN])}{more}",
            _hint(checkpoint, method),
        )
    return checkpoint


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Raise ``UserError`` for a checkpoint that somebody has quantized already."""
    quantization = quantization_of(checkpoint.config)
    if quantization is not None:
        method = str(quantization.get("quant_method", "a method that it does not name"))[:40]
        raise UserError(
            f"{checkpoint.path} is already quantized, by {method} (its config.json has a quantization_config); quern "
            "starts from unquantized weights. Give the original checkpoint"
        )


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the model itself."""
    return {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}


def _differences(checkpoint: Checkpoint, architecture: Architecture, wanted: Mapping[str, Expected]) -> list[str]:
    infos = checkpoint.source.infos
    surplus = [name for name in sorted(set(infos) - set(wanted)) if not _harmless(name, architecture, infos)]
    problems = _surplus(surplus, architecture)
    problems += [f"tensor {name!r} is missing" for name in sorted(set(wanted) - set(infos))]
    for name in sorted(set(wanted) & set(infos)):
        problems += _misfit(name, infos[name], wanted[name])
    return problems


def _misfit(name: str, info: TensorInfo, wanted: Expected) -> list[str]:
    if info.shape != wanted.shape:
        return [f"tensor {name!r} has shape {info.shape}, the config calls for {wanted.shape}"]
    if DTYPES[info.dtype] not in wanted.dtypes:
        named = ", ".join(sorted(key for key, dtype in DTYPES.items() if dtype in wanted.dtypes))
        return [f"tensor {name!r} has dtype {info.dtype}; there it must be {named}"]
    return []


def _harmless(name: str, architecture: Architecture, infos: Mapping[str, TensorInfo]) -> bool:
    """Old checkpoints' rotary frequencies, which models compute themselves, and a head that repeats the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and architecture.tied and EMBEDDING in infos)


def _surplus(names: list[str], architecture: Architecture) -> list[str]:
    """Tensors that the model has no place for; layers beyond its last one in one sentence."""
    layers = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    problems = []
    if layers and (last := max(layers)) >= architecture.layers:
        beyond = [name for name in names if (m := _LAYER.match(name)) and int(m[1]) >= architecture.layers]
        problems.append(f"the config says num_hidden_layers {architecture.layers}, the weights have {last + 1} layers")
        names = [name for name in names if name not in set(beyond)]
    return problems + [f"tensor {name!r} is not part of such a model" for name in names]


def _compressed_differences(checkpoint: Checkpoint, architecture: Architecture) -> list[str]:
    """Of a compressed-tensors folder: a weight is stored as it is, or as parts whose shapes the package itself checks."""
    infos = checkpoint.source.infos
    wanted = expected.unquantized(architecture)
    modules = {name.removesuffix(".weight") for name in wanted if name.endswith(".weight")}
    parts = {f"{module}.{part}": module for module in modules for part in _COMPRESSED_PARTS}
    packed = {parts[name] for name in infos if name in parts}
    surplus = [n for n in sorted(set(infos) - set(wanted) - set(parts)) if not _harmless(n, architecture, infos)]
    problems = _surplus(surplus, architecture)
    for name, what in sorted(wanted.items()):
        if name.removesuffix(".weight") in packed and name.endswith(".weight"):
            continue
        problems += _misfit(name, infos[name], what) if name in infos else [f"tensor {name!r} is missing"]
    return problems


def _hint(checkpoint: Checkpoint, method: str | None) -> str:
    if method is not None:
        return "The artifact is damaged or belongs to another config.json; get its files again, or quantize again"
    infos = checkpoint.source.infos
    if any(name.endswith(_ROUNDED) for name in infos) or any(info.dtype.startswith("F8_") for info in infos.values()):
        return (
            "The weights were quantized by another tool, and config.json has lost its quantization_config. Get the "
            "unquantized checkpoint, or the config.json that belongs to these weights"
        )
    return "Check that config.json belongs to these weights"
