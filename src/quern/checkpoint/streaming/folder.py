"""A Hub model as a folder without weights, whose shards come when they are read (``source.py``)."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json, write_json
from quern.checkpoint.folder import INDEX, SINGLE
from quern.checkpoint.hub import UNWANTED, WANTED, explained, is_hub_id
from quern.checkpoint.safetensors_file import HEADER_LIMIT
from quern.checkpoint.strangers import ADAPTER_WEIGHTS
from quern.checkpoint.streaming.hub_files import RemoteFile, endpoint, fetch
from quern.checkpoint.streaming.source import STREAM, Manifest, Shard, StreamedTensor, StreamSource
from quern.core.errors import BadFileError, UserError, option
from quern.core.progress import Progress, Silent

_SUFFIX = ".safetensors"


def streamed(model: str | Path, progress: Progress | None = None) -> Path:
    """A folder for the Hub model ``model``, in quern's cache: configuration, tokenizer and what its shards hold, by their
    headers. Raises ``UserError`` for other models and where the Hub does not answer, ``BadFileError`` for damage."""
    repository = str(model)
    if Path(repository).exists() or not is_hub_id(repository):
        asked = option("stream=True", "--stream")
        raise UserError(
            f"{asked} is for models of the Hub, such as Qwen/Qwen2.5-0.5B; MODEL is {repository!r}. Leave it out"
        )
    from huggingface_hub import HfApi

    (progress or Silent()).log(f"asking the Hugging Face Hub for the shards of {repository}")
    with explained(repository):
        api = HfApi(endpoint=endpoint())
        told = api.model_info(repository, files_metadata=True)
        revision = str(told.sha)
        siblings = [_remote(repository, revision, one) for one in told.siblings or [] if _wanted(one.rfilename)]
        files, folder = {one.name: one for one in siblings}, _folder(repository, revision)
        if not (folder / STREAM).is_file():
            for name in sorted(files):
                if not name.endswith(_SUFFIX):
                    fetch(files[name], folder)
            found = _manifest(api, repository, revision, files, folder)
            write_json(folder / STREAM, found.model_dump(mode="json", exclude_none=True))
    return folder


def forget_shards(checkpoint: Checkpoint) -> None:
    """Delete the shards of a streamed checkpoint that are still there; of any other nothing."""
    source: Any = checkpoint.source
    while source is not None and not isinstance(source, StreamSource):
        source = getattr(source, "source", None) or getattr(source, "stored", None)
    if source is not None:
        source.shards.clear()


def _folder(repository: str, revision: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    cache = Path(base) if base else Path.home() / ".cache"
    return cache / "quern" / "streams" / repository.replace("/", "--") / revision[:16]


def _wanted(name: str) -> bool:
    def named(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return named(WANTED) and not named([*UNWANTED, f"{ADAPTER_WEIGHTS}*", ".*"])


def _remote(repository: str, revision: str, sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    sha256, sha1 = (str(lfs.sha256), None) if lfs is not None else (None, str(sibling.blob_id))
    return RemoteFile(repository, revision, str(sibling.rfilename), int(sibling.size), sha256, sha1)


def _manifest(api: Any, repository: str, revision: str, files: dict[str, RemoteFile], folder: Path) -> Manifest:
    """Every tensor by the headers of the shards, of which only these are fetched."""
    shards = _shards(repository, files, folder)
    tensors: dict[str, StreamedTensor] = {}
    for shard in shards:
        header = api.parse_safetensors_file_metadata(repository, shard, revision=revision)
        for name, info in header.tensors.items():
            if name in tensors:
                raise BadFileError(
                    folder / shard, f"holds tensor {name[:200]!r}, which {tensors[name].shard} holds too"
                )
            tensors[name] = StreamedTensor(shard=shard, dtype=info.dtype, shape=tuple(info.shape))
    said = {one: Shard(size=files[one].size, sha256=files[one].sha256, git_sha1=files[one].git_sha1) for one in shards}
    return Manifest(repository=repository, revision=revision, shards=said, tensors=tensors)


def _shards(repository: str, files: dict[str, RemoteFile], folder: Path) -> list[str]:
    """The files that hold the weights, sorted."""
    present = sorted(name for name in files if name.endswith(_SUFFIX))
    if SINGLE in present:
        return [SINGLE]
    if INDEX in files:
        weight_map = read_json(folder / INDEX, HEADER_LIMIT).get("weight_map")
        named = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if missing := [name for name in named if name not in files]:
            raise BadFileError(folder / INDEX, f"names {missing[0][:200]!r}, which {repository} has not")
        present = named
    if not present:
        raise UserError(
            f"the Hub model {repository} has no safetensors files, and pickles are not read. Use another model"
        )
    return present
