"""Calibration text to token sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quern.core.errors import BadFileError, UserError, option
from quern.core.recipe import Calibration
from quern.core.seeds import generator
from quern.evaluation.heldout import training_calibration_text


def read_texts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Files as (name, text). Raises ``BadFileError``."""
    documents = []
    for path in paths:
        try:
            documents.append((Path(path).name, Path(path).read_text("utf-8")))
        except OSError as error:
            raise BadFileError(path, f"cannot be read: {error.strerror}", "Give a UTF-8 text file") from None
        except UnicodeDecodeError:
            raise BadFileError(path, "is not UTF-8 text", "Convert it to UTF-8") from None
    return documents


def calibration_documents(paths: Sequence[str | Path]) -> list[tuple[str, str]]:
    """The user's texts, or modules of the running Python's standard library where there are none."""
    return read_texts([Path(path) for path in paths]) if paths else training_calibration_text()


def text_sha256(documents: Sequence[tuple[str, str]]) -> str:
    """Hexadecimal SHA-256 of the texts, in order; names do not count."""
    digest = hashlib.sha256()
    for _, text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def calibration_sequences(
    documents: Sequence[tuple[str, str]],
    tokenizer: Any,
    settings: Calibration,
    context: int,
    vocabulary: int,
    seed: int,
) -> Tensor:
    """Token sequences int64 ``(sequences, time)``: windows of the joined documents, drawn without repetition.

    ``time`` is the recipe's sequence length or the model's ``context`` if that is less. Raises ``UserError`` when the
    text is too short or its tokens do not fit the ``vocabulary``.
    """
    time = min(settings.sequence_length, context)
    wanted = max(1, settings.tokens // time)
    ids: list[int] = []
    for _, text in documents:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(ids) // time
    if windows < wanted:
        raise UserError(
            f"the calibration text has {len(ids)} tokens; the recipe wants {wanted} sequences of {time} = {wanted * time}. "
            f"Give more text with {option('calibration', '--calibration')}, or "
            f"set calibration.tokens to at most {windows * time} in the recipe"
        )
    if max(ids) >= vocabulary:
        raise UserError(
            f"the tokenizer makes token {max(ids)}, but the embedding has {vocabulary} rows. "
            "Check that the tokenizer belongs to this model"
        )
    chosen = sorted(generator(seed, "calibration windows").choice(windows, wanted, replace=False).tolist())
    return torch.tensor([ids[start * time : (start + 1) * time] for start in chosen], dtype=torch.int64)
