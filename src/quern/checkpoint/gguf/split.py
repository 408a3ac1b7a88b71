"""A model in several GGUF files, as llama.cpp's ``gguf-split`` writes them: any of them stands for the whole.

Each says ``split.no`` (from 0), ``split.count`` and ``split.tensors.count`` (of all together); the first holds the model's
metadata, and maybe no tensors. Their names end in ``-00001-of-00003.gguf`` and so on, which is how the others are found.
What a file says about the others is checked before one of them is opened.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quern.checkpoint.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from quern.core.errors import BadFileError

MOST_PARTS = 10_000
_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL | re.IGNORECASE)
_AGAIN = "Download all parts of one split again, into one folder"
_SHOWN = 5


@dataclass(frozen=True)
class GgufParts:
    """The files of one model. ``header``: the first one's metadata, and the tensors of all."""

    paths: tuple[Path, ...]
    header: GgufHeader
    places: dict[str, Path]
    """The file that holds a tensor."""


def part_name(stem: str, number: int, count: int) -> str:
    """Name of part ``number`` (from 0) of ``count`` of a model whose single file would be ``STEM.gguf``."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def splits_of(path: Path) -> list[list[Path]]:
    """The splits beside ``path`` that are named after it, each by the parts that are there; the first part is."""
    found = []
    for first in sorted(path.parent.glob(f"{glob.escape(path.stem)}-00001-of-*.gguf")):
        match = _NAME.fullmatch(first.name)
        if match is not None and match[1] == path.stem and 1 < (count := int(match[3])) <= MOST_PARTS:
            names = (part_name(path.stem, number, count) for number in range(count))
            found.append([part for name in names if (part := path.with_name(name)).is_file()])
    return found


def split_metadata(number: int, count: int, tensors: int) -> dict[str, Any]:
    """What part ``number`` (from 0) of ``count`` says, ``tensors`` of all parts together; in llama.cpp's types."""
    return {
        "split.no": np.uint16(number),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(tensors),
    }


def read_parts(path: Path, kept: frozenset[str] = frozenset()) -> GgufParts:
    """The GGUF that ``path`` is, or is one part of. ``kept``: see ``read_gguf_header``. Raises ``BadFileError``."""
    header = read_gguf_header(path, kept)
    count = _number(path, header, "split.count", 1)
    if count <= 1:
        return GgufParts((path,), header, dict.fromkeys(header.tensors, path))
    paths = _paths(path, count, _number(path, header, "split.no", 0))
    headers = [header if part == path else read_gguf_header(part, kept) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    places: dict[str, Path] = {}
    for number, (part, found) in enumerate(zip(paths, headers, strict=True)):
        said = (_number(part, found, "split.no", 0), _number(part, found, "split.count", 1))
        if said != (number, count):
            raise BadFileError(part, f"says that it is part {said[0] + 1} of {said[1]}, unlike its name", _AGAIN)
        for name, tensor in found.tensors.items():
            if name in tensors:
                raise BadFileError(part, f"holds tensor {name!r} again, which {places[name].name} holds too", _AGAIN)
            tensors[name], places[name] = tensor, part
    expected = _number(paths[0], headers[0], "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise BadFileError(paths[0], f"says that all parts hold {expected} tensors; they hold {len(tensors)}", _AGAIN)
    return GgufParts(tuple(paths), GgufHeader(headers[0].metadata, tensors), places)


def first_part(path: Path) -> Path:
    """The part that holds the metadata (and so the tokenizer) of the model that ``path`` belongs to."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 < int(match[3]) <= MOST_PARTS:
        return path
    first = path.with_name(f"{match[1]}-{1:05d}-of-{match[3]}{path.name[-5:]}")
    return first if first.is_file() else path


def _number(path: Path, header: GgufHeader, key: str, default: int) -> int:
    value: Any = header.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise BadFileError(path, f"metadata {key!r} is {str(value)[:40]}; it must be a number from 0", _AGAIN)
    return int(value)


def _paths(path: Path, count: int, number: int) -> list[Path]:
    """All parts in their order; those that are missing are named."""
    if count > MOST_PARTS:
        raise BadFileError(path, f"says that it is one of {count} parts; at most {MOST_PARTS} are allowed", _AGAIN)
    match = _NAME.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise BadFileError(
            path,
            f"is part {number + 1} of {count}, and its name must end in -{number + 1:05d}-of-{count:05d}.gguf, so that "
            "the others are found",
            "Give all parts the names that they had, in one folder",
        )
    names = [f"{match[1]}-{part + 1:05d}-of-{count:05d}{path.name[-5:]}" for part in range(count)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise BadFileError(
            path, f"is one of {count} parts, of which {', '.join(missing[:_SHOWN])}{more} is missing beside it",
            "Download the missing files into the same folder",
        )  # fmt: skip
    return [path.with_name(name) for name in names]
