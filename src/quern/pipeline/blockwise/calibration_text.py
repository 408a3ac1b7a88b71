"""Calibration text to token sequences.

Texts of up to ``WHOLE`` characters are tokenized whole, and windows are drawn from all of their tokens. Of longer ones
pieces are drawn while they are read, by the seed, and only those are tokenized: memory and time of tokenizing do not grow
with the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quern.core.errors import UserError, option
from quern.core.recipe_parts import Calibration
from quern.core.seeds import generator
from quern.evaluation.heldout import training_calibration_text
from quern.texts.pieces import cut_pieces
from quern.texts.records import Chat, chat_of
from quern.texts.source import Text, TextFile, each, read_text
from quern.texts.tokens import check_vocabulary, document_ids

WHOLE = 8 * 1024 * 1024
"""Characters up to which texts are tokenized whole (or 32 for each token that is wanted, if that is more)."""
_PER_TOKEN = 32
_PIECE = 8
"""Characters of a drawn piece for each token of a sequence: few texts have longer tokens on average."""
_SPARE = 8

Ids = NDArray[np.int32]


class CalibrationText:
    """The user's texts, or modules of the running Python's standard library where there are none.

    Raises ``BadFileError`` for files that cannot be used.
    """

    def __init__(self, texts: Sequence[str | Path | Text], tokenizer: Any, settings: Calibration) -> None:
        self._texts: list[Text | TextFile] = [
            text if isinstance(text, Text) else read_text(text) for text in each(texts)
        ] or _standard_library()
        self._tokenizer, self._settings = tokenizer, settings
        self._chat: Chat | None = chat_of(tokenizer)
        self._notes: list[str] = []
        self._whole = self._read(max(WHOLE, _PER_TOKEN * settings.tokens))
        self.sha256 = self._hash() if self._whole is None else text_sha256(self._whole)
        """Of the texts that were read, in order; names do not count. Of texts that pieces are drawn from: of the files."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken of files of records, and whether sequences were drawn from pieces or are short."""
        return tuple(self._notes)

    def sequences(self, context: int, vocabulary: int, seed: int, or_fewer: bool = False) -> Tensor:
        """Token sequences int64 ``(sequences, time)``: windows of the joined documents, drawn without repetition.

        ``time`` is the recipe's sequence length or the model's ``context`` if that is less. Raises ``UserError`` when the
        text is too short, if it has not one sequence where there may be ``or_fewer``, or tokens that were drawn are not in
        the ``vocabulary``.
        """
        time = min(self._settings.sequence_length, context)
        wanted = max(1, self._settings.tokens // time)
        least = 1 if or_fewer else wanted
        windows = (
            self._all_windows(time, least)
            if self._whole is not None
            else self._drawn_windows(time, wanted, least, seed)
        )
        wanted = min(wanted, len(windows))
        chosen = np.sort(generator(seed, "calibration windows").choice(len(windows), wanted, replace=False))
        found = windows[chosen]
        check_vocabulary([int(found.max())], self._tokenizer, vocabulary)
        return torch.from_numpy(found.astype(np.int64))

    def _read(self, most: int) -> list[str] | None:
        """All documents, or None where they have more than ``most`` characters."""
        documents: list[str] = []
        self._notes, length = [], 0
        for text in self._texts:
            reading = text.read(self._chat, articles=False)
            for document in reading:
                parts = []
                for string in document:
                    parts.append(string)
                    length += len(string)
                    if length > most:
                        return None
                documents.append("".join(parts))
            self._notes += [reading.note] if reading.note else []
        return documents

    def _hash(self) -> str:
        digest = hashlib.sha256(b"pieces of texts")
        for text in self._texts:
            digest.update(text.sha256.encode())
        digest.update(str(getattr(self._tokenizer, "chat_template", None)).encode())
        return digest.hexdigest()

    def _all_windows(self, time: int, wanted: int) -> Ids:
        """Windows ``(windows, time)`` of all tokens, one behind the other."""
        assert self._whole is not None
        ids = _joined(ids for document in self._whole for ids in document_ids(self._tokenizer, [document]))
        if len(ids) < wanted * time:
            if wanted > 1 or len(ids) < max(2, self._settings.tokens):
                raise self._too_short(len(ids), time, wanted)
            self._notes.append(f"calibrated on one sequence of {len(ids)} tokens, which is all of the text")
            time = len(ids)
        return ids[: len(ids) // time * time].reshape(-1, time)

    def _too_short(self, count: int, time: int, wanted: int) -> UserError:
        has = (
            f"the calibration text has {count} tokens; the recipe wants {wanted} sequences of {time} = {wanted * time}"
        )
        more = f"Give more text with {option('calibration', '--calibration')}"
        if count >= time:
            return UserError(
                f"{has}. {more}, or fewer {option('calibration_tokens', '--calibration-tokens')}: at most "
                f"{count // time * time}"
            )
        if count < 2:
            return UserError(f"{has}. {more}")
        return UserError(
            f"{has}. {more}, or set calibration.tokens and calibration.sequence_length to at most {count} in the recipe"
        )

    def _drawn_windows(self, time: int, wanted: int, least: int, seed: int) -> Ids:
        """Windows ``(windows, time)`` of pieces of the texts, in the order of the texts; ``wanted`` or more, or all that
        there are if these are ``least``."""
        count = 2 * wanted + _SPARE
        while True:
            self._notes = []
            pieces, all_of = self._draw(count, _PIECE * time, seed)
            ids = [_joined(ids for part in piece for ids in document_ids(self._tokenizer, [part])) for piece in pieces]
            windows = [found[: len(found) // time * time].reshape(-1, time) for found in ids]
            total = sum(map(len, windows))
            if total >= wanted or len(pieces) == all_of:
                break
            count *= 2
        if total < least:
            raise self._too_short(sum(map(len, ids)), time, wanted)
        self._notes.append(
            f"the calibration text is long: sequences are from {len(pieces)} of its {all_of} pieces of about "
            f"{_PIECE * time} characters, drawn by the seed"
        )
        return np.concatenate(windows)

    def _draw(self, count: int, size: int, seed: int) -> tuple[list[list[str]], int]:
        """``count`` pieces of all texts, each as likely, in order, and how many there are (Vitter 1985, algorithm R)."""
        random = generator(seed, "calibration pieces")
        kept: dict[int, tuple[int, list[str]]] = {}
        number = 0
        for number, piece in enumerate(self._pieces(size), start=1):
            place = number - 1 if number <= count else int(random.integers(number))
            if place < count:
                kept[place] = (number, piece)
        return [piece for _, piece in sorted(kept.values(), key=lambda item: item[0])], number

    def _pieces(self, size: int) -> Iterator[list[str]]:
        """All texts in pieces of about ``size`` characters, each as the parts of documents that it is made of."""
        parts: list[str] = []
        length = 0
        for text in self._texts:
            reading = text.read(self._chat, articles=False)
            for document in reading:
                for string in cut_pieces(document, size):
                    parts.append(string)
                    length += len(string)
                    if length >= size * 3 // 4:
                        yield parts
                        parts, length = [], 0
            self._notes += [reading.note] if reading.note else []
        if parts:
            yield parts


def _standard_library() -> list[Text | TextFile]:
    return [Text.of(name, [text]) for name, text in training_calibration_text()]


def _joined(lists: Iterable[list[int]]) -> Ids:
    return np.concatenate([np.zeros(0, np.int32), *(np.array(ids, dtype=np.int32) for ids in lists)])


def text_sha256(documents: Sequence[str]) -> str:
    """Hexadecimal SHA-256 of the texts, in order."""
    digest = hashlib.sha256()
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
