"""Hugging Face folders: ``config.json`` and the weights in one safetensors file or in shards, with an index or without; or
the seed that they are drawn from (``synthetic.py``), or shards that come from the Hub as they are read (``streaming/``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quern.checkpoint.files import read_json
from quern.checkpoint.safetensors_file import HEADER_LIMIT, TensorInfo, read_header, read_tensor
from quern.checkpoint.strangers import ADAPTER_WEIGHTS, CONSOLIDATED, what_else
from quern.checkpoint.streaming.source import STREAM, open_stream
from quern.checkpoint.synthetic import SYNTHETIC, open_synthetic
from quern.core.errors import BadFileError
from quern.core.text.language import gettext, ngettext, translatable

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = translatable("Download or copy the checkpoint again")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", re.DOTALL)
_MOST_SHARDS = 100_000
_SHOWN = 5


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

    def plain(self, name: str) -> bool:
        """Whether a tensor's bytes in the file are its numbers in their order."""
        return True

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory on the CPU."""
        return read_tensor(self.places[name], self.infos[name])


OpenContainer = Callable[[Path, dict[str, Any]], Any]
"""From a folder and its configuration to its tensors (a ``TensorSource``); None where they are in no file of that kind."""


def no_container(folder: Path, config: dict[str, Any]) -> None:
    """For those who know of safetensors only."""


def open_folder(folder: Path, open_container: OpenContainer = no_container) -> tuple[dict[str, Any], Any]:
    """The configuration and the tensors (a ``TensorSource``) of a Hugging Face folder. Raises ``BadFileError``."""
    if not (folder / CONFIG).is_file():
        raise what_else(folder, gettext("holds no {file}", file=CONFIG))
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise BadFileError(
            folder / CONFIG, gettext("names no model_type"), gettext("Give the config.json that belongs to the weights")
        )
    if config.get("quantization_config", config) is None:
        del config["quantization_config"]  # some tools write null for none
    if (folder / SYNTHETIC).is_file():
        return config, open_synthetic(folder)
    if (folder / STREAM).is_file():
        return config, open_stream(folder)
    source = open_container(folder, config)
    return config, open_tensors(folder) if source is None else source


def open_tensors(folder: Path) -> FolderSource:
    """The tensors of a folder's safetensors files, as they lie there. Raises ``BadFileError``."""
    if (folder / SINGLE).is_file():
        infos = read_header(folder / SINGLE)
        source = FolderSource(infos, dict.fromkeys(infos, folder / SINGLE))
    elif (folder / INDEX).is_file():
        source = _open_indexed(folder)
    else:
        source = _open_without_index(folder)
    if not source.infos:
        raise BadFileError(folder, gettext("holds no tensors"), gettext("Give a folder with weights"))
    return source


def _open_indexed(folder: Path) -> FolderSource:
    index = folder / INDEX
    weight_map = read_json(index, HEADER_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadFileError(index, gettext("has no weight_map from tensor names to file names"), _AGAIN)
    shards = sorted(set(weight_map.values()))
    _check_shards(index, shards)
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise BadFileError(
                folder / shard,
                gettext("lacks tensor {name!r}, which {index} places there", name=name, index=INDEX),
                _AGAIN,
            )
    for shard, header in headers.items():
        for name in header:
            if weight_map.get(name) != shard:
                raise BadFileError(
                    index,
                    gettext("does not place tensor {name!r} in {shard}, which holds it", name=name, shard=shard),
                    _AGAIN,
                )
    return FolderSource(
        {name: headers[shard][name] for name, shard in weight_map.items()},
        {name: folder / shard for name, shard in weight_map.items()},
    )


def _check_shards(index: Path, shards: Iterable[str]) -> None:
    missing = []
    for shard in shards:
        if not shard.endswith(".safetensors") or any(character in shard for character in "/\\\0"):
            raise BadFileError(
                index,
                gettext(
                    "names the shard {name!r}; only plain *.safetensors names inside the folder are allowed",
                    name=shard[:200],
                ),
                _AGAIN,
            )
        if not (index.parent / shard).exists():
            missing.append(shard[:200])
    if missing:
        raise BadFileError(
            index,
            ngettext(
                "names {files}, which is missing",
                "names {files}, which are missing",
                len(missing),
                files=_listed(missing),
            ),
            _DOWNLOAD,
        )


_DOWNLOAD = translatable("Download the missing files into the same folder")


def _listed(names: list[str]) -> str:
    more = gettext(" and {count} more", count=len(names) - _SHOWN) if len(names) > _SHOWN else ""
    shown = ", ".join(map(repr, names[:_SHOWN])) + more
    return ngettext("the shard {names}", "the shards {names}", len(names), names=shown)


def _open_without_index(folder: Path) -> FolderSource:
    """All safetensors files of a folder, which name their tensors themselves."""
    files = sorted(
        path.name
        for path in folder.glob("*.safetensors")
        if not path.name.startswith((CONSOLIDATED, ADAPTER_WEIGHTS)) and path.is_file()
    )
    if not files:
        raise what_else(folder, gettext("holds neither {file} nor {index}", file=SINGLE, index=INDEX))
    _check_numbers(folder, files)
    infos: dict[str, TensorInfo] = {}
    places: dict[str, Path] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            if name in infos:
                raise BadFileError(
                    folder / file,
                    gettext(
                        "holds tensor {name!r}, which {other} holds too, and no {index} says which counts",
                        name=name[:200],
                        other=places[name].name,
                        index=INDEX,
                    ),
                    gettext("Remove the file that does not belong to the model, or get its index"),
                )
            infos[name], places[name] = info, folder / file
    return FolderSource(infos, places)


def _check_numbers(folder: Path, files: list[str]) -> None:
    """Names like ``model-00001-of-00003.safetensors`` say how many there must be."""
    numbered = [match for file in files if (match := _SHARD.fullmatch(file))]
    for stem, count in sorted({(match[1], match[3]) for match in numbered}):
        if int(count) > _MOST_SHARDS:
            raise BadFileError(
                folder, gettext("holds one of {count} shards, which no model has", count=int(count)), _AGAIN
            )
        wanted = [f"{stem}-{number + 1:05d}-of-{count}.safetensors" for number in range(int(count))]
        if missing := sorted(set(wanted) - set(files)):
            raise BadFileError(
                folder, gettext("lacks {files} of {count}", files=_listed(missing), count=int(count)), _DOWNLOAD
            )
