"""What lies in a model folder: every tensor's shape, codec, granularity, bits and bytes, counted from the files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.checkpoint.gguf.file import GgufSource
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import CODECS
from quern.comparison.artifact_size import artifact_bytes, weight_bytes
from quern.core.artifact import METHOD, module_schemes
from quern.core.errors import BadFileError, QuernError, UserError
from quern.core.metrics import bits_per_weight
from quern.loading.expected import FLOATS
from quern.loading.fitting import COMPRESSED, fitted, model_config

NO_GRANULARITY = "-"
_SMALL_PARTS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the model; all parts of a quantized weight (codes, scales, zero points) are one row."""

    name: str
    shape: tuple[int, ...]
    """Of the weight, not of its packed form."""
    codec: str
    """Name of the codec, or the dtype (of a GGUF: the block type) of what quern did not quantize."""
    granularity: str
    """``tensor``, ``channel``, ``group 64``; ``-`` where nothing is scaled."""
    bits: float
    """Of one stored code or number, scales not counted."""
    bytes: int
    """Of all parts, in the file."""


@dataclass(frozen=True)
class Inspection:
    """A model on disk."""

    path: Path
    bytes: int
    """All files of an artifact; of another checkpoint its weights, configuration and tokenizer."""
    tensors: list[TensorRow]
    bits_per_weight: float
    """8 x bytes of the tensors / parameters."""
    parameters: int
    recipe: str | None
    """Name of the recipe, where quern wrote the model."""
    notes: tuple[str, ...] = ()
    """What should be known of it: who quantized it, what was lost before, why it does not run."""


@dataclass(frozen=True)
class _Weight:
    """A quantized weight: its row's contents and the tensors it is made of."""

    shape: tuple[int, ...]
    codec: str
    granularity: str
    bits: float
    parts: tuple[str, ...]


def inspect(path: str | Path) -> Inspection:
    """How the model at ``path`` (artifact, folder, Hub id or GGUF file) is stored. Reads headers, not weights.

    Raises ``UserError`` or ``BadFileError`` for what is no model, and for an artifact whose ``config.json`` and tensors
    contradict each other. An unquantized model that does not fit its configuration is shown, with a note.
    """
    checkpoint = open_checkpoint(path)
    found = checkpoint.config.get("quantization_config")
    config: dict[str, Any] = found if isinstance(found, dict) else {}
    method = config.get("quant_method")
    if method == METHOD:
        weights = dict(_quern_weights(checkpoint, config))
    elif method == COMPRESSED:
        try:
            weights = dict(_compressed_weights(checkpoint, config))
        except QuernError:
            raise
        except (TypeError, ValueError, AttributeError, re.error) as error:  # of values that are not what they should be
            raise _unusable(checkpoint, f"the quantization_config is damaged: {error}") from None
    else:
        weights = dict(_foreign_weights(checkpoint, str(method))) if config else {}
    tensors = [_quantized_row(checkpoint, module, weight) for module, weight in weights.items()]
    claimed = {part for weight in weights.values() for part in weight.parts}
    plain = [_plain_row(checkpoint, name) for name in checkpoint.names() if name not in claimed]
    parameters = _parameters(checkpoint, weights, plain)
    return Inspection(
        path=checkpoint.path,
        bytes=artifact_bytes(checkpoint),
        tensors=sorted([*tensors, *plain], key=lambda row: _natural(row.name)),
        bits_per_weight=bits_per_weight(weight_bytes(checkpoint), parameters),
        parameters=parameters,
        recipe=_recipe_name(config),
        notes=(*checkpoint.notes, *_notes(checkpoint, config)),
    )


def _notes(checkpoint: Checkpoint, config: dict[str, Any]) -> list[str]:
    """Who quantized the model, where nobody here runs it, and what does not fit."""
    method = config.get("quant_method")
    if config and method not in (METHOD, COMPRESSED):
        bits = config.get("bits") or config.get("w_bit") or (4 if config.get("load_in_4bit") else None)
        width = f" to {bits} bits" if type(bits) is int else ""
        return [f"quantized{width} by {str(method)[:40]}, which quern neither runs nor quantizes again"]
    try:
        fitted(checkpoint)
    except UserError as error:
        return [f"it cannot be run or quantized: {error}"]
    return []


def _foreign_weights(checkpoint: Checkpoint, method: str) -> Iterator[tuple[str, _Weight]]:
    """Weights that another tool packed: what lies under a linear's name belongs to it, whatever the parts are called."""
    try:
        shapes = architecture_of(model_config(checkpoint)).expected_shapes()
    except UserError:  # a family that is not known: its tensors are shown as they are stored
        return
    infos = checkpoint.source.infos
    under: dict[str, list[str]] = {}
    for name in infos:
        words = name.split(".")
        for end in range(1, len(words)):
            under.setdefault(".".join(words[:end]), []).append(name)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        stored = infos.get(name)
        if not name.endswith(".weight") or len(shape) != 2 or module not in under:
            continue
        if stored is not None and stored.shape == shape and DTYPES[stored.dtype] in FLOATS:
            continue
        held = tuple(part for part in under[module] if part not in shapes or part == name)
        if held:
            bits = 8 * max(infos[part].stored_bytes for part in held) / math.prod(shape)
            yield module, _Weight(shape, method[:40], NO_GRANULARITY, round(bits, 2), held)


def _quern_weights(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, _Weight]]:
    shapes = architecture_of(checkpoint.config).expected_shapes()
    for module, scheme in module_schemes(config).items():
        shape = shapes.get(f"{module}.weight", ())
        if len(shape) != 2:
            raise _unusable(checkpoint, f"module {module!r} is no linear or embedding of this model")
        parts = CODECS.get(scheme.codec)(scheme).part_shapes((shape[0], shape[1]))
        names = tuple(f"{module}.{part}" for part in parts)
        granularity = _granularity(scheme.granularity, scheme.group_size)
        yield module, _Weight(shape, scheme.codec, granularity, scheme.bits, names)


def _compressed_weights(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, _Weight]]:
    groups = list(_mapping(checkpoint, config, "config_groups").values())
    for scale in checkpoint.names():
        if not scale.endswith(".weight_scale"):
            continue
        module = scale.removesuffix(".weight_scale")
        arguments = _group_of(checkpoint, groups, module)
        packed = f"{module}.weight_packed" in checkpoint.source.infos
        values = f"{module}.weight_packed" if packed else f"{module}.weight"
        if f"{module}.weight_shape" in checkpoint.source.infos:
            shape = tuple(int(size) for size in checkpoint.read(f"{module}.weight_shape").reshape(-1).tolist())
        else:
            shape = checkpoint.info(values).shape
        small = [f"{module}.{part}" for part in _SMALL_PARTS if f"{module}.{part}" in checkpoint.source.infos]
        codec = "integer" if arguments.get("type", "int") == "int" else str(arguments["type"])
        granularity = _granularity(str(arguments.get("strategy")), arguments.get("group_size"))
        yield module, _Weight(shape, codec, granularity, int(arguments.get("num_bits", 8)), (values, *small))


def _group_of(checkpoint: Checkpoint, groups: list[Any], module: str) -> dict[str, Any]:
    """The weight arguments of the config group that ``module`` belongs to: by name, else by pattern, else by class."""
    ways: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and re.match(target[3:], module) is not None,
        lambda target: target[:1].isupper(),
    )
    for fits in ways:
        for group in groups:
            if any(fits(target) for target in group.get("targets", [])) and isinstance(group.get("weights"), dict):
                arguments: dict[str, Any] = group["weights"]
                return arguments
    raise _unusable(checkpoint, f"no config group of the quantization_config covers module {module!r}")


def _granularity(kind: str, group_size: int | None) -> str:
    return f"group {group_size}" if kind == "group" else kind


def _mapping(checkpoint: Checkpoint, config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        raise _unusable(checkpoint, f"the quantization_config has no usable {key!r}")
    return value


def _unusable(checkpoint: Checkpoint, problem: str) -> BadFileError:
    return BadFileError(checkpoint.path / "config.json", problem, "Quantize the model again, or get its files again")


def _quantized_row(checkpoint: Checkpoint, module: str, weight: _Weight) -> TensorRow:
    stored = sum(checkpoint.info(part).stored_bytes for part in weight.parts)
    return TensorRow(f"{module}.weight", weight.shape, weight.codec, weight.granularity, weight.bits, stored)


def _plain_row(checkpoint: Checkpoint, name: str) -> TensorRow:
    info = checkpoint.info(name)
    bits = 8 * info.stored_bytes / info.elements if info.elements else 0
    return TensorRow(
        name, info.shape, _dtype(checkpoint, name).lower(), NO_GRANULARITY, round(bits, 4), info.stored_bytes
    )


def _dtype(checkpoint: Checkpoint, name: str) -> str:
    source = checkpoint.source
    if isinstance(source, GgufSource):
        return str(GGMLQuantizationType(source.stored[name].kind).name)
    return checkpoint.info(name).dtype


def _parameters(checkpoint: Checkpoint, weights: dict[str, _Weight], plain: list[TensorRow]) -> int:
    """Weights of the model; what quantization adds beside them (scales of inputs) is no weight."""
    if not weights:
        return checkpoint.parameters
    of_quantized = sum(math.prod(weight.shape) for weight in weights.values())
    added = {f"{module}.{name}" for module in weights for name in ("input_scale", "input_zero_point")}
    return of_quantized + sum(math.prod(row.shape) for row in plain if row.name not in added)


def _recipe_name(config: dict[str, Any]) -> str | None:
    recipe = config.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    return name if isinstance(name, str) else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]
