"""What lies in a model folder: every tensor's shape, codec, granularity, bits and bytes, counted from the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.foreign.decoded import decoded, foreign_weights
from quern.checkpoint.gguf.file import GgufSource
from quern.checkpoint.safetensors_file import DTYPES
from quern.checkpoint.streaming.folder import streamed
from quern.comparison.artifact_size import artifact_bytes, loaded_bytes, weight_bytes
from quern.core.errors import UserError
from quern.core.metrics import bits_per_weight
from quern.engines.cpu import cache_sizes
from quern.formats.base import CodedPart, StoredWeight, format_of, reader_of
from quern.formats.fit import FLOATS
from quern.loading.fitting import fitted, model_config, open_stored, read_methods
from quern.loading.padding import original_shapes, padding_notes
from quern.pipeline.output import health_notes

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
    coded_bits: float | None = None
    """Bits that one weight of its largest entropy-coded tensor takes in the file; None where none is coded."""
    entropy: float | None = None
    """Order-0 entropy of the codes of that tensor, in bits a weight: what coding each code for itself takes at least."""


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
    cache_bytes_per_token: dict[str, int] = field(default_factory=dict)
    """By precision of the cpu engine's key/value cache, what one token of context takes; empty where it knows no layout."""
    context: int | None = None
    """Tokens of the longest text; None where the configuration does not say."""
    notes: tuple[str, ...] = ()
    """What should be known of it: who quantized it, what was lost before, why it does not run."""
    loaded_bytes: int | None = None
    """Of the tensors in memory, as they are read; None where that is what they take in the files."""


def inspect(path: str | Path, *, stream: bool = False) -> Inspection:
    """How the model at ``path`` (artifact, folder, Hub id or GGUF file) is stored. Reads headers; of weights only those that
    are entropy-coded, all of them. ``stream``: of a Hub model only the headers of its shards are fetched.

    Raises ``UserError`` or ``BadFileError`` for what is no model, and for an artifact whose ``config.json`` and tensors
    contradict each other or coded tensors are damaged. An unquantized model that does not fit its configuration is shown,
    with a note.
    """
    checkpoint = open_stored(streamed(path) if stream else path)
    return _without_padding(_inspect(checkpoint), checkpoint)


def _inspect(checkpoint: Checkpoint) -> Inspection:
    found = checkpoint.config.get("quantization_config")
    config: dict[str, Any] = found if isinstance(found, dict) else {}
    method = config.get("quant_method")
    if format_of(method) is None and (read := _decoded(checkpoint)) is not checkpoint:
        return _inspect_decoded(read, str(method))
    notes, coded = _notes(checkpoint, config), {}
    if format_of(method) is not None:
        reader = reader_of(config, architecture_of(model_config(checkpoint)))
        assert reader is not None
        weights, recipe = dict(reader.describe(checkpoint)), reader.recipe_name()
        coded = {} if notes else dict(reader.coded(checkpoint))
    else:
        weights, recipe = dict(_foreign_weights(checkpoint, str(method))) if config else {}, None
    tensors = [_quantized_row(checkpoint, module, weight, coded) for module, weight in weights.items()]
    claimed = {part for weight in weights.values() for part in weight.parts}
    plain = [_plain_row(checkpoint, name, coded) for name in checkpoint.names() if name not in claimed]
    parameters = _parameters(checkpoint, weights, plain)
    context = checkpoint.config.get("max_position_embeddings")
    return Inspection(
        path=checkpoint.path,
        bytes=artifact_bytes(checkpoint),
        tensors=sorted([*tensors, *plain], key=lambda row: _natural(row.name)),
        # Weights that are drawn from a seed are in no file; they count as they are in memory.
        bits_per_weight=bits_per_weight(weight_bytes(checkpoint) or loaded_bytes(checkpoint), parameters),
        parameters=parameters,
        recipe=recipe,
        cache_bytes_per_token=_cache_sizes(checkpoint),
        context=context if type(context) is int and context > 0 else None,
        notes=(*checkpoint.notes, *notes, *health_notes(checkpoint.path)),
        loaded_bytes=loaded_bytes(checkpoint) if coded else None,
    )


def _without_padding(found: Inspection, checkpoint: Checkpoint) -> Inspection:
    """With the shapes of the model's own, and a note, where quern padded it."""
    shapes = original_shapes(checkpoint)
    if not shapes:
        return found
    added = sum(math.prod(row.shape) - math.prod(shapes[row.name]) for row in found.tensors if row.name in shapes)
    parameters = found.parameters - added
    return replace(
        found,
        tensors=[replace(row, shape=shapes.get(row.name, row.shape)) for row in found.tensors],
        bits_per_weight=found.bits_per_weight * found.parameters / parameters,
        parameters=parameters,
        notes=(*found.notes, *padding_notes(checkpoint)),
    )


def _decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The same with other tools' weights decoded, where they can be."""
    try:
        return decoded(checkpoint)
    except UserError:  # said in the notes
        return checkpoint


def _inspect_decoded(checkpoint: Checkpoint, method: str) -> Inspection:
    """What another tool quantized and is read as decoded values."""
    weights, infos = foreign_weights(checkpoint), checkpoint.source.infos
    rows = [_plain_row(checkpoint, name, {}) for name in checkpoint.names() if name not in weights]
    for name, weight in weights.items():
        rows.append(TensorRow(name, weight.shape, method, weight.granularity, weight.bits, infos[name].stored_bytes))
    return Inspection(
        path=checkpoint.path,
        bytes=artifact_bytes(checkpoint),
        tensors=sorted(rows, key=lambda row: _natural(row.name)),
        bits_per_weight=bits_per_weight(weight_bytes(checkpoint), checkpoint.parameters),
        parameters=checkpoint.parameters,
        recipe=None,
        notes=(*checkpoint.notes, *_notes(checkpoint, {}), *health_notes(checkpoint.path)),
    )


def _cache_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    try:
        return cache_sizes(architecture_of(model_config(checkpoint)))
    except UserError:  # a family that is not known
        return {}


def _notes(checkpoint: Checkpoint, config: dict[str, Any]) -> list[str]:
    """Who quantized the model, where nobody here runs it, and what does not fit."""
    method = config.get("quant_method")
    if config and format_of(method) is None:
        try:
            decoded(checkpoint)
        except UserError as error:
            return [f"it cannot be run or quantized: {error}"]
        bits = config.get("bits") or config.get("w_bit") or (4 if config.get("load_in_4bit") else None)
        width = f" to {bits} bits" if type(bits) is int else ""
        return [
            f"quantized{width} by {str(method)[:40]}, which quern neither runs nor quantizes again (it reads "
            f"{read_methods()})"
        ]
    try:
        fitted(checkpoint)
    except UserError as error:
        return [f"it cannot be run or quantized: {error}"]
    return []


def _foreign_weights(checkpoint: Checkpoint, method: str) -> Iterator[tuple[str, StoredWeight]]:
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
            yield module, StoredWeight(shape, method[:40], NO_GRANULARITY, round(bits, 2), held)


def _quantized_row(
    checkpoint: Checkpoint, module: str, weight: StoredWeight, coded: Mapping[str, CodedPart]
) -> TensorRow:
    stored = sum(checkpoint.info(part).stored_bytes for part in weight.parts)
    row = TensorRow(f"{module}.weight", weight.shape, weight.codec, weight.granularity, weight.bits, stored)
    return _with_entropy(row, [coded[part] for part in weight.parts if part in coded])


def _plain_row(checkpoint: Checkpoint, name: str, coded: Mapping[str, CodedPart]) -> TensorRow:
    info = checkpoint.info(name)
    loaded = DTYPES[info.dtype].itemsize * info.elements
    in_file = info.stored_bytes or loaded  # what lies in no file here counts as it is in memory
    bits = 8 * (loaded if name in coded else in_file) / info.elements if info.elements else 0
    row = TensorRow(name, info.shape, _dtype(checkpoint, name).lower(), NO_GRANULARITY, round(bits, 4), in_file)
    return _with_entropy(row, [coded[name]] if name in coded else [])


def _with_entropy(row: TensorRow, coded: list[CodedPart]) -> TensorRow:
    """The row with what its largest coded part takes, and would at least."""
    if not coded:
        return row
    part, weights = max(coded, key=lambda one: one.bytes), math.prod(row.shape)
    return replace(row, coded_bits=8 * part.bytes / weights, entropy=part.entropy_bits / weights)


def _dtype(checkpoint: Checkpoint, name: str) -> str:
    source = checkpoint.source
    if isinstance(source, GgufSource):
        return str(GGMLQuantizationType(source.stored[name].kind).name)
    return checkpoint.info(name).dtype


def _parameters(checkpoint: Checkpoint, weights: dict[str, StoredWeight], plain: list[TensorRow]) -> int:
    """Weights of the model; what quantization adds beside them (scales of inputs) is no weight."""
    if not weights:
        return checkpoint.parameters
    of_quantized = sum(math.prod(weight.shape) for weight in weights.values())
    added = {f"{module}.{name}" for module in weights for name in ("input_scale", "input_zero_point")}
    return of_quantized + sum(math.prod(row.shape) for row in plain if row.name not in added)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]
