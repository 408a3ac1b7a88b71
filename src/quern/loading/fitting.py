"""Opening a checkpoint for use: its tensors must be those that its configuration calls for.

Every command and engine opens models by ``open_model``, so that one rule holds for all of them: what is missing, left over,
or of another shape or dtype is refused before anything is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.checkpoint.foreign.base import known_methods
from quern.checkpoint.foreign.decoded import decoded, foreign_weights, without
from quern.core.artifact import PROVENANCE, quantization_of
from quern.core.errors import BadFileError, UserError
from quern.core.progress import Progress
from quern.core.text.language import gettext
from quern.formats.base import format_of, open_container, reader_of
from quern.formats.fit import differences, plain
from quern.loading.layout import relaid
from quern.loading.padding import unpadded

_SHOWN = 5
_ROUNDED = ("weight_scale_inv", "weight_scale", "qweight", "qzeros", "scales", "absmax", "SCB", "weight_packed")
"""Ends of names that only quantized checkpoints have."""


def open_stored(model: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open a model as it is stored: folder, Hub id, GGUF file, or an artifact of any format.

    Raises ``UserError`` for what is no model, ``BadFileError`` for a damaged one.
    """
    return open_checkpoint(model, progress=progress, open_container=open_container)


def open_any(model: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open a model whether it fits or not; what other tools quantized is decoded where no format of quern's runs it.

    Raises ``UserError`` for what is no model, ``BadFileError`` for a damaged one.
    """
    checkpoint = open_stored(model, progress=progress)
    return checkpoint if format_of(_method(checkpoint)) is not None else decoded(checkpoint)


def open_model(model: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open a model that is to be used: folder, Hub id, GGUF file or artifact.

    Raises ``UserError`` for what is no model, ``BadFileError`` where tensors and configuration do not fit each other.
    """
    return fitted(open_any(model, progress=progress))


def open_original(model: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open a model that is to be quantized: unquantized, or what another tool quantized, decoded; without what quern padded.

    Raises as ``open_model`` does, and ``UserError`` for quern's own artifacts and for what nobody here reads.
    """
    checkpoint = open_stored(model, progress=progress)
    ours = (checkpoint.path / PROVENANCE).is_file() and format_of(_method(checkpoint)) is not None
    checkpoint = fitted(checkpoint if ours else decoded(checkpoint))
    _require_unquantized(checkpoint)
    return unpadded(checkpoint)


def _method(checkpoint: Checkpoint) -> object:
    quantization = quantization_of(checkpoint.config)
    return None if quantization is None else quantization.get("quant_method")


def fitted(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint``, if its tensors fit its configuration (see ``open_model``).

    What other tools quantized and nobody here reads is left to whoever refuses it.
    """
    quantization = quantization_of(checkpoint.config)
    method = None if quantization is None else quantization.get("quant_method")
    if quantization is not None and format_of(method) is None:
        return checkpoint
    architecture = architecture_of(checkpoint.config)
    checkpoint = _without_zero_biases(checkpoint, architecture)
    layout = None
    if (reader := reader_of(quantization, architecture)) is not None:
        problems = reader.problems(checkpoint)
    else:
        layout = architecture.layout(checkpoint.source.infos)
        problems = differences(checkpoint, architecture, plain(layout.shapes))
    if problems:
        more = gettext("; and {count} more", count=len(problems) - _SHOWN) if len(problems) > _SHOWN else ""
        raise BadFileError(
            checkpoint.path,
            gettext(
                "config and weights disagree: {problems}{more}",
                problems=gettext("; ").join(problems[:_SHOWN]),
                more=more,
            ),
            _hint(checkpoint, method),
        )
    return checkpoint if layout is None else relaid(checkpoint, layout)


def _without_zero_biases(checkpoint: Checkpoint, architecture: Architecture) -> Checkpoint:
    """The same without biases of zeros where the model has none: some tools give every linear that they pack one."""
    packed = foreign_weights(checkpoint)
    biases = {f"{name.removesuffix('.weight')}.bias" for name in packed} & set(checkpoint.source.infos)
    extra = sorted(biases - set(architecture.expected_shapes())) if biases else []
    return without(checkpoint, [name for name in extra if not checkpoint.read(name).any()])


def _require_unquantized(checkpoint: Checkpoint) -> None:
    """Raise ``UserError`` for a checkpoint that somebody has quantized already."""
    quantization = quantization_of(checkpoint.config)
    if quantization is not None:
        method = str(quantization.get("quant_method", gettext("a method that it does not name")))[:40]
        raise UserError(
            gettext(
                "{path} is already quantized, by {method} (its config.json has a quantization_config); quern starts "
                "from unquantized weights, or from what these wrote: {methods}. Give the original checkpoint",
                path=checkpoint.path,
                method=method,
                methods=read_methods(),
            )
        )


def read_methods() -> str:
    """The methods of other tools whose weights are read, by their ``quant_method``, for messages."""
    return ", ".join(name for name, _ in known_methods())


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the model itself."""
    return {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}


def _hint(checkpoint: Checkpoint, method: object) -> str:
    if method is not None:
        return gettext(
            "The artifact is damaged or belongs to another config.json; get its files again, or quantize again"
        )
    infos = checkpoint.source.infos
    if any(name.endswith(_ROUNDED) for name in infos) or any(info.dtype.startswith("F8_") for info in infos.values()):
        return gettext(
            "The weights were quantized by another tool, and config.json has lost its quantization_config. Get the "
            "unquantized checkpoint, or the config.json that belongs to these weights"
        )
    return gettext("Check that config.json belongs to these weights")
