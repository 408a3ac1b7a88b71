"""The tokenizer that comes with a checkpoint: loading it, checking it against the embedding, copying its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quern.checkpoint.files import InputFile, read_json, refuse_pointer, write_bytes
from quern.checkpoint.gguf_tokenizer import load_gguf_tokenizer
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
_SUFFICIENT = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_JSON_LIMIT = 256 * 1024 * 1024


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of ``COPIED`` that ``folder`` holds, sorted by name."""
    return sorted(folder / name for name in COPIED if (folder / name).is_file())


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder or GGUF file; code in the folder is never run, nothing is downloaded.

    Raises ``UserError`` where there is none or it cannot be used, ``BadFileError`` where a file is malformed.
    """
    path = Path(path)
    if path.is_file():
        return load_gguf_tokenizer(path)
    if not any((path / name).is_file() for name in _SUFFICIENT):
        raise UserError(
            f"{path} has no tokenizer ({', '.join(_SUFFICIENT)}). Copy the model's tokenizer.json and "
            "tokenizer_config.json into it"
        )
    for file in tokenizer_files(path):
        with InputFile(file) as opened:
            refuse_pointer(opened)
    tokenizer = _load(path)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{path} has a tokenizer without a fast version ({type(tokenizer).__name__}). Convert it to tokenizer.json "
            "with transformers and put that into the folder"
        )
    return tokenizer


def _load(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        with _quiet():
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


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, vocabulary_size: int) -> None:
    """Raise ``UserError`` when a token's id has no row in an embedding of ``vocabulary_size`` rows."""
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if not 0 <= index < vocabulary_size}
    if beyond:
        token, index = max(beyond.items(), key=lambda item: item[1])
        raise UserError(
            f"the tokenizer does not fit the embedding of {vocabulary_size} rows: {len(beyond)} of {len(tokenizer)} "
            f"tokens have no row, for instance {token!r}, id {index}. Use the tokenizer that belongs to this model"
        )


def copy_tokenizer(source: Path, destination: Path) -> list[Path]:
    """Put the tokenizer (and generation defaults) of a checkpoint folder or GGUF file into a folder; what was written.

    Files of a folder are copied byte by byte; the tokenizer of a GGUF is saved as transformers saves it.
    """
    if source.is_file():
        load_tokenizer(source).save_pretrained(str(destination))
        return tokenizer_files(destination)
    copies: list[Path] = []
    for path in tokenizer_files(source):
        with InputFile(path) as file:
            refuse_pointer(file)
            write_bytes(destination / path.name, file.read(0, file.size))
        copies.append(destination / path.name)
    return copies
