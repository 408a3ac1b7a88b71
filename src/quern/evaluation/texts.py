"""Windows: what is scored of the texts, in token ids.

A *document* is what the interval of a mean resamples (``texts/source.py``). A *window* is a run of tokens inside one
document that the model sees at once; it starts with the tokenizer's beginning-of-sequence token where the tokenizer has
that habit. Position t of a window predicts token t + 1, so its first token is not scored.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.files import write_bytes
from quern.core.errors import UserError
from quern.core.results import TextSource
from quern.texts.records import chat_of
from quern.texts.source import Text, TextFile
from quern.texts.tokens import Tokenizer, check_vocabulary, document_ids, leading_special

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Tokens that a model sees at once."""

    document: int
    """Number of the document, counted over all texts."""
    ids: Ids
    """``(time,)``, at least 2; the first one is not scored."""


@dataclass(frozen=True)
class Windows:
    """Everything that is scored, in the order in which it is scored."""

    windows: tuple[Window, ...]
    sources: tuple[TextSource, ...]

    @property
    def scored(self) -> int:
        """Tokens that get a score."""
        return sum(len(window.ids) - 1 for window in self.windows)

    def sha256(self) -> str:
        """Hash of the token ids and where windows and documents end."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(f"{window.document},{len(window.ids)};".encode())
            digest.update(window.ids.astype("<i8").tobytes())
        return digest.hexdigest()


def cut_windows(
    texts: Sequence[Text | TextFile], tokenizer: Tokenizer, *, vocabulary_size: int, tokens: int, window: int
) -> Windows:
    """``tokens`` token ids of ``texts`` in windows of at most ``window``, from as many documents as possible.

    First every document gives its first window, then every one its second, until there are ``tokens``; the windows are
    then put in the order of the text. No more is read and tokenized than that takes. Raises ``UserError`` where the texts
    are too short, or where a token to score is not in the vocabulary.
    """
    if window < 2 or tokens < 2:
        raise UserError(f"a window needs at least 2 tokens, one to read and one to score; got {window} of {tokens}")
    beginnings = _Beginnings(texts, tokenizer, window, tokens)
    chosen, total = [], 0
    for document, start, ids in beginnings.by_turns():
        ids = ids[: tokens - total]
        if len(ids) >= 2:
            chosen.append((document, start, ids))
            total += len(ids)
        if tokens - total < 2:
            break
    if tokens - total >= 2:
        names = ", ".join(text.name for text in texts)
        raise UserError(
            f"too little text: {tokens} tokens are asked for, {names} {'has' if len(texts) == 1 else 'have'} {total}. "
            f"Give more text{f', or ask for at most {total} tokens' if total else ''}"
        )
    check_vocabulary((token for _, _, ids in chosen for token in ids), tokenizer, vocabulary_size)
    windows = tuple(Window(document, np.array(ids, dtype=np.int64)) for document, _, ids in sorted(chosen))
    return Windows(windows, beginnings.sources(windows))


class _Beginnings:
    """The beginnings of all documents as token ids: as many windows of each as it takes to have ``tokens``.

    Texts are read again with twice as many windows of each document until that is enough, so that of a long document only
    the part is tokenized that gets scored, and of many documents only the first.
    """

    def __init__(self, texts: Sequence[Text | TextFile], tokenizer: Tokenizer, window: int, tokens: int) -> None:
        self._texts, self._tokenizer, self._tokens = texts, tokenizer, tokens
        self._prefix = leading_special(tokenizer)
        self._step = window - len(self._prefix)
        self._rounds = 1
        while not self._read():
            self._rounds *= 2

    def _read(self) -> bool:
        """Read the documents; whether that was enough, or all that there is."""
        self._ids: list[list[int]] = []
        self._owners: list[int] = []
        self._notes: list[str | None] = [None] * len(self._texts)
        total, cut, chat = 0, False, chat_of(self._tokenizer)
        for number, text in enumerate(self._texts):
            reading = text.read(chat)
            for document in reading:
                ids, ended = self._beginning(document)
                cut |= not ended
                self._ids.append(ids)
                self._owners.append(number)
                total += self._windowed(len(ids))
                if self._rounds == 1 and self._tokens - total < 2:
                    break
            self._notes[number] = reading.note
            if self._rounds == 1 and self._tokens - total < 2:
                return True
        return self._tokens - total < 2 or not cut

    def _beginning(self, document: Iterable[str]) -> tuple[list[int], bool]:
        """Its first token ids, and whether they are all of them."""
        most = self._rounds * self._step
        ids: list[int] = []
        for piece in document_ids(self._tokenizer, document):
            ids += piece
            if len(ids) > most + 1:
                break
        if self._prefix and ids[:1] == self._prefix:
            del ids[0]  # the text spells the token that every window begins with
        return ids[:most], len(ids) <= most

    def _windowed(self, count: int) -> int:
        """How many tokens the windows of a document have, its first ``count`` taken; a lone one cannot be scored."""
        full, rest = divmod(count, self._step)
        with_prefix = rest + len(self._prefix)
        return full * (self._step + len(self._prefix)) + (with_prefix if rest and with_prefix > 1 else 0)

    def by_turns(self) -> Iterator[tuple[int, int, list[int]]]:
        """Number of the document, place in it, and ids of each window: first windows, then second ones and so on."""
        for start in range(0, max(map(len, self._ids), default=0), self._step):
            for document, ids in enumerate(self._ids):
                if len(ids) > start:
                    yield document, start, self._prefix + ids[start : start + self._step]

    def sources(self, windows: Sequence[Window]) -> tuple[TextSource, ...]:
        """Each text with the number of its tokens that get a score."""
        counts = [0] * len(self._texts)
        for window in windows:
            counts[self._owners[window.document]] += len(window.ids) - 1
        return tuple(
            TextSource(name=text.name, sha256=text.sha256, tokens=count, taken=note)
            for text, count, note in zip(self._texts, counts, self._notes)
        )


def save_windows(path: Path, windows: Windows) -> None:
    """Write the windows for another process, atomically."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=np.concatenate([window.ids for window in windows.windows]),
        lengths=np.array([len(window.ids) for window in windows.windows]),
        documents=np.array([window.document for window in windows.windows]),
    )
    write_bytes(path, buffer.getvalue())


def load_windows(path: Path) -> tuple[Window, ...]:
    """The windows that ``save_windows`` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        ids, lengths, documents = stored["ids"], stored["lengths"], stored["documents"]
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    return tuple(Window(int(document), piece) for document, piece in zip(documents, pieces))
