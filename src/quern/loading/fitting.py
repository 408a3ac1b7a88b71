"""Opening a checkpoint for use: its tensors must be those that its configuration calls for.

Every command and engine opens models by ``open_model``, so that one rule holds for all of them: what is missing, left over,
or of another shape or dtype is refused before anything is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quern.architectures.base import architecture_of
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.core.artifact import quantization_of
from quern.core.errors import BadFileError, UserError
from quern.core.progress import Progress
from quern.formats.base import format_of, open_container, reader_of
from quern.formats.fit import differences, plain

_SHOWN = 5
_ROUNDED = ("weight_scale_inv", "weight_scale", "qweight", "qzeros", "scales", "absmax", "SCB", "weight_packed")
"""Ends of names that only quantized checkpoints have."""


def open_any(model: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open a model whether it fits or not: folder, Hub id, GGUF file, or an artifact of any format.

    Raises ``UserError`` for what is no model, ``BadFileError`` for a damaged one.
    """
    return open_checkpoint(model, progress=progress, open_container=open_container)


def open_model(model: str | Path, *, progress: Progress | None = None) -> Checkpoint:
    """Open a model that is to be used: folder, Hub id, GGUF file or artifact.

    Raises ``UserError`` for what is no model, ``BadFileError`` where tensors and configuration do not fit each other.
    """
    return fitted(open_any(model, progress=progress))


def fitted(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint``, if its tensors fit its configuration (see ``open_model``).

    What other tools quantized is left to whoever can run it.
    """
    quantization = quantization_of(checkpoint.config)
    method = None if quantization is None else quantization.get("quant_method")
    if quantization is not None and format_of(method) is None:
        return checkpoint
    architecture = architecture_of(checkpoint.config)
    if (reader := reader_of(quantization, architecture)) is not None:
        problems = reader.problems(checkpoint)
    else:
        problems = differences(checkpoint, architecture, plain(architecture.expected_shapes()))
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


def _hint(checkpoint: Checkpoint, method: object) -> str:
    if method is not None:
        return "The artifact is damaged or belongs to another config.json; get its files again, or quantize again"
    infos = checkpoint.source.infos
    if any(name.endswith(_ROUNDED) for name in infos) or any(info.dtype.startswith("F8_") for info in infos.values()):
        return (
            "The weights were quantized by another tool, and config.json has lost its quantization_config. Get the "
            "unquantized checkpoint, or the config.json that belongs to these weights"
        )
    return "Check that config.json belongs to these weights"
