"""The model that is spoken of: its configuration and what its tensors are, with no weight read.

A folder may hold the weights, their description (``synthetic.json``) or the configuration alone, whose family then says
which tensors there would be. Of a Hub model only the small files are downloaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.counts import check_counts
from quern.checkpoint.files import read_json
from quern.checkpoint.folder import CONFIG, INDEX, SINGLE
from quern.checkpoint.hub import is_hub_id
from quern.checkpoint.synthetic import SYNTHETIC, Description, DrawnTensor, SyntheticSource
from quern.checkpoint.tokenizer import tokenizer_sources
from quern.core.errors import UserError
from quern.core.progress import Progress, Silent
from quern.loading.fitting import open_original

SMALL_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Subject:
    """A model whose weights need not be there."""

    checkpoint: Checkpoint
    architecture: Architecture
    weights: bool
    """Whether its weights can be read; otherwise there is its configuration alone."""
    tokenizer: bool
    """Whether there is a tokenizer."""

    @property
    def drawn(self) -> bool:
        """Whether weights are drawn from a seed when they are read."""
        return self.weights and isinstance(self.checkpoint.source, SyntheticSource)


def open_subject(model: str | Path, progress: Progress | None = None) -> Subject:
    """Open a model folder, a GGUF file, a ``config.json`` or a Hub id. Raises ``UserError`` and ``BadFileError``."""
    path = Path(model)
    if not path.exists() and is_hub_id(str(model)):
        path = _small_files(str(model), progress or Silent())
    if path.is_file() and path.name == CONFIG:
        path = path.parent
    if _has_weights(path):
        checkpoint = open_original(path, progress=progress)
        weights = True
    else:
        checkpoint, weights = _described(path), False
    folder = checkpoint.path
    tokenizer = folder.is_file() or bool(tokenizer_sources(folder))
    return Subject(checkpoint, architecture_of(checkpoint.config), weights, tokenizer)


def _has_weights(path: Path) -> bool:
    """Also where there is neither a configuration nor a folder: whoever opens it says what is wrong."""
    if not (path.is_dir() and (path / CONFIG).is_file()):
        return True
    if any((path / name).exists() for name in (SYNTHETIC, SINGLE, INDEX)):
        return True
    return any(name.endswith((".safetensors", ".bin", ".gguf", ".zip")) for name in os.listdir(path))


def _described(folder: Path) -> Checkpoint:
    """The checkpoint that a configuration calls for, as if its tensors were drawn from a seed."""
    config: dict[str, Any] = read_json(folder / CONFIG)
    check_counts(folder, config)
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{folder / CONFIG} is that of a quantized model. Give the configuration of the original, or its folder"
        )
    said = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    shapes = architecture_of(config).expected_shapes()
    tensors = {
        name: DrawnTensor.model_validate({"dtype": _DTYPES.get(said, "BF16"), "shape": shape})
        for name, shape in shapes.items()
    }
    source = SyntheticSource(folder / CONFIG, Description(version=1, tensors=tensors))
    note = f"the folder holds no weights: their shapes are those that its {CONFIG} calls for, in {said}"
    return Checkpoint(folder, config, source, (note,))


def _small_files(repository: str, progress: Progress) -> Path:
    """The snapshot folder of a Hub model with its configuration and tokenizer. Raises ``UserError``."""
    from huggingface_hub import snapshot_download

    progress.log(f"getting the configuration of {repository} from the Hugging Face Hub")
    try:
        return Path(snapshot_download(repository, allow_patterns=SMALL_FILES, ignore_patterns=["*/*", INDEX]))
    except Exception as error:  # network libraries raise kinds of their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"MODEL {repository!r} is no local folder, and getting its configuration from the Hub failed: {first}. Check "
            "the network, or give a folder with its config.json"
        ) from None
