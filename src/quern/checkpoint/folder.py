"""Hugging Face folders: ``config.json`` and the weights in one safetensors file or in shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quern.checkpoint.files import read_json
from quern.checkpoint.safetensors_file import HEADER_LIMIT, TensorInfo, read_header, read_tensor
from quern.core.errors import BadFileError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "Download or copy the checkpoint again"


@dataclass(frozen=True)
class FolderSource:
    """Tensors in one safetensors file or in shards."""

    infos: Mapping[str, TensorInfo]
    places: Mapping[str, Path]

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The file or its shards."""
        return tuple(sorted(set(self.places.values())))

    def place(self, name: str) -> Path:
        """The file or shard that holds a tensor."""
        return self.places[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory on the CPU."""
        return read_tensor(self.places[name], self.infos[name])


def open_folder(folder: Path) -> tuple[dict[str, Any], FolderSource]:
    """The configuration and the tensors of a Hugging Face folder. Raises ``BadFileError``."""
    if not (folder / CONFIG).is_file():
        raise BadFileError(folder, f"holds no {CONFIG}", _what_else(folder))
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise BadFileError(folder / CONFIG, "names no model_type", "Give the config.json that belongs to the weights")
    if (folder / SINGLE).is_file():
        infos = read_header(folder / SINGLE)
        source = FolderSource(infos, dict.fromkeys(infos, folder / SINGLE))
    elif (folder / INDEX).is_file():
        source = _open_shards(folder)
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise pickle_refused(folder, pickles[0])
        raise BadFileError(folder, f"holds neither {SINGLE} nor {INDEX}", _what_else(folder))
    if not source.infos:
        raise BadFileError(folder, "holds no tensors", "Give a folder with weights")
    return config, source


def _what_else(folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".gguf":
            return f"It holds {path.name}: give that file as MODEL"
    return f"Give a folder with {CONFIG} and {SINGLE} (or its shards), a Hub id, or a .gguf file"


def pickle_refused(path: Path, name: str) -> BadFileError:
    """The error for weights in the pickle called ``name``."""
    return BadFileError(
        path,
        f"has its weights in {name}, a pickle, which can run any code when it is read, so quern does not",
        "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
    )


def _open_shards(folder: Path) -> FolderSource:
    index = folder / INDEX
    weight_map = read_json(index, HEADER_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadFileError(index, "has no weight_map from tensor names to file names", _AGAIN)
    headers = {shard: read_header(_shard_path(index, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise BadFileError(folder / shard, f"lacks tensor {name!r}, which {INDEX} places there", _AGAIN)
    for shard, header in headers.items():
        for name in header:
            if weight_map.get(name) != shard:
                raise BadFileError(index, f"does not place tensor {name!r} in {shard}, which holds it", _AGAIN)
    return FolderSource(
        {name: headers[shard][name] for name, shard in weight_map.items()},
        {name: folder / shard for name, shard in weight_map.items()},
    )


def _shard_path(index: Path, shard: str) -> Path:
    plain = shard.endswith(".safetensors") and not any(character in shard for character in "/\\\0")
    if not plain:
        raise BadFileError(
            index,
            f"names the shard {shard[:200]!r}; only plain *.safetensors names inside the folder are allowed",
            _AGAIN,
        )
    path = index.parent / shard
    if not path.exists():
        raise BadFileError(index, f"names the shard {shard[:200]!r}, which is missing", "Download the missing file")
    return path
