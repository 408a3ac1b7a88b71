"""The tokenizer that comes with a checkpoint: loading it, checking it against the embedding, copying its files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quern.checkpoint.counts import check_counts
from quern.checkpoint.files import InputFile, read_json, refuse_pointer, write_bytes
from quern.checkpoint.folder import CONFIG
from quern.checkpoint.gguf.tokenizer import load_gguf_tokenizer
from quern.checkpoint.panics import panics_as_errors
from quern.core.errors import BadFileError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that an artifact takes over from its checkpoint: text to tokens, and defaults of generation."""
PACKED = "tokenizer.model"
_SENTENCEPIECE = ("SentencePiece model", {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"})
_TIKTOKEN = ("tiktoken vocabulary", {"tiktoken": "tiktoken"})
"""Packages that transformers needs to read it, and a module of each."""
_SUFFICIENT = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_JSON_LIMIT = 256 * 1024 * 1024


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of ``COPIED`` that ``folder`` holds, sorted by name."""
    return sorted(folder / name for name in COPIED if (folder / name).is_file())


def tokenizer_sources(folder: Path) -> list[Path]:
    """Those files of ``folder`` of which each suffices to make a tokenizer."""
    return [folder / name for name in _SUFFICIENT if (folder / name).is_file()]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder or GGUF file; code in the folder is never run, nothing is downloaded.

    Raises ``UserError`` where there is none or it cannot be used, ``BadFileError`` where a file is malformed.
    """
    path = Path(path)
    if path.is_file():
        return load_gguf_tokenizer(path)
    if not tokenizer_sources(path):
        raise UserError(
            f"{path} has no tokenizer ({', '.join(_SUFFICIENT)}). Copy the model's tokenizer.json and "
            "tokenizer_config.json into it"
        )
    for file in tokenizer_files(path):
        with InputFile(file) as opened:
            refuse_pointer(opened)
    _check_packages(path)
    if (path / CONFIG).is_file():  # which transformers builds a model's configuration of, only to load a tokenizer
        check_counts(path, read_json(path / CONFIG))
    tokenizer = _load(path)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{path} has a tokenizer without a fast version ({type(tokenizer).__name__}). Convert it to tokenizer.json "
            "with transformers and put that into the folder"
        )
    return tokenizer


def _packages(folder: Path) -> tuple[str, dict[str, str]] | None:
    """What the folder's tokenizer is and the packages that transformers reads it with; None where it needs none."""
    if tokenizer_sources(folder) != [folder / PACKED]:
        return None
    with InputFile(folder / PACKED) as file:
        first = file.read(0, min(1, file.size))
    # A SentencePiece model is a protocol buffer, whose first field is a list; tiktoken's file is lines of base64.
    return _SENTENCEPIECE if first == b"\n" else _TIKTOKEN


def _check_packages(folder: Path) -> None:
    """Raise ``UserError`` where only a packed vocabulary is there and what reads it is not installed."""
    kind, packages = _packages(folder) or ("", {})
    missing = [package for package, module in packages.items() if not _importable(module)]
    if missing:
        raise UserError(
            f"{folder} has its tokenizer as {PACKED} only, a {kind}, and reading that needs {' and '.join(packages)}. "
            f"Run: pip install {' '.join(missing)}; or put the model's tokenizer.json into the folder"
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _installed(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _load(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        with _quiet(), panics_as_errors():
            tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        return tokenizer
    except Exception as error:  # the tokenizer libraries raise bare Exception for a malformed file
        for file in tokenizer_files(folder):
            if file.suffix == ".json":
                read_json(file, _JSON_LIMIT)  # names the file where it is no JSON at all
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        hint = "Give a folder that holds the model's tokenizer.json and tokenizer_config.json"
        if found := _packages(folder):
            # Whatever fails with SentencePiece, transformers tries tiktoken next and speaks of that.
            first = f"{PACKED} is damaged, or these packages do not go together: {', '.join(map(_installed, found[1]))}"
            hint = f"{hint}, or run: pip install --upgrade {' '.join(found[1])}"
        raise BadFileError(folder, f"its tokenizer cannot be loaded: {first}", hint) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice on standard error; what matters is checked and said here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def usable_tokenizer(path: str | Path, needed: bool) -> PreTrainedTokenizerFast | None:
    """``load_tokenizer``, before a long job begins; None for a model that has no tokenizer at all, if none is ``needed``."""
    path = Path(path)
    if not needed and path.is_dir() and not tokenizer_sources(path):
        return None
    return load_tokenizer(path)


def copy_tokenizer(source: Path, destination: Path) -> list[Path]:
    """Put the tokenizer (and generation defaults) of a checkpoint folder or GGUF file into a folder; what was written.

    Files of a folder are copied byte by byte; the tokenizer of a GGUF is saved as transformers saves it, and so is one that
    needs other packages to be read, so that the copy does without them.
    """
    if source.is_file():
        load_tokenizer(source).save_pretrained(str(destination))
        return tokenizer_files(destination)
    copies: list[Path] = []
    if _packages(source):
        load_tokenizer(source).save_pretrained(str(destination))
        copies += tokenizer_files(destination)
    for path in tokenizer_files(source):
        if destination / path.name in copies:
            continue
        with InputFile(path) as file:
            refuse_pointer(file)
            write_bytes(destination / path.name, file.read(0, file.size))
        copies.append(destination / path.name)
    return copies
