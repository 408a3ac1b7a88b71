"""Texts to score: files or strings become documents, documents become windows of token ids.

A *document* is what the interval of a mean resamples: a file, an element of a JSON list of strings, or an article of
WikiText. A *window* is a run of tokens inside one document that the model sees at once; it starts with the tokenizer's
beginning-of-sequence token where the tokenizer has that habit. Position t of a window predicts token t + 1, so its
first token is not scored.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quern.checkpoint.files import write_bytes
from quern.core.errors import BadFileError, UserError
from quern.core.results import TextSource
from quern.texts.tokens import Tokenizer, check_vocabulary, leading_special

Ids = NDArray[np.int64]

_HEADING = re.compile(r"(?m)^ ?= (?!=)[^\n]*(?<!=) = ?$")
"""`` = Title = `` of WikiText; deeper headings have `` = = Title = = ``."""


@dataclass(frozen=True)
class Text:
    """A named text in documents. ``sha256`` is that of the file's bytes, or of the strings as a JSON list."""

    name: str
    documents: tuple[str, ...]
    sha256: str

    @classmethod
    def of(cls, name: str, documents: Iterable[str]) -> Text:
        """A text that lies in memory. Raises ``UserError`` if nothing but white space is in it."""
        strings = [document for document in documents if document.strip()]
        if not strings:
            raise UserError(f"text {name!r} is empty; give text to score")
        return cls(name, tuple(strings), hashlib.sha256(json.dumps(strings).encode()).hexdigest())


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


def read_text(path: str | Path) -> Text:
    """The documents of a UTF-8 file: a ``.json`` list of strings, WikiText cut at its articles, or one document.

    Lines end by ``\\n``, whichever system wrote the file.
    Raises ``BadFileError`` for a file that cannot be read, is not UTF-8, is empty, or is JSON of another kind.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise BadFileError(path, f"cannot be read: {error.strerror}", "Give a text file") from None
    except UnicodeDecodeError as error:
        raise BadFileError(path, f"is not UTF-8 text (byte {error.start})", "Give a text file in UTF-8") from None
    documents = _json_strings(path, content) if path.suffix == ".json" else split_articles(content)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise BadFileError(path, "holds no text", "Give a file with text to score")
    return Text(path.name, tuple(documents), hashlib.sha256(raw).hexdigest())


def _json_strings(path: Path, content: str) -> list[str]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadFileError(path, f"is not JSON: {error}", "Give a list of strings, or a plain text as .txt") from None
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        raise BadFileError(path, "is not a JSON list of strings", "Give a list of strings, or a plain text as .txt")
    return data


def split_articles(content: str) -> list[str]:
    """WikiText at its top-level headings; any other text (its first line is no such heading) whole."""
    first = content.lstrip("\n ").split("\n", 1)[0]
    if not _HEADING.fullmatch(first.rstrip() + " "):
        return [content]
    starts = [match.start() for match in _HEADING.finditer(content)]
    return [content[start:end] for start, end in zip([0, *starts[1:]], [*starts[1:], len(content)])]


def cut_windows(
    texts: Sequence[Text], tokenizer: Tokenizer, *, vocabulary_size: int, tokens: int, window: int
) -> Windows:
    """``tokens`` token ids of ``texts`` in windows of at most ``window``, from as many documents as possible.

    First every document gives its first window, then every one its second, until there are ``tokens``; the windows are
    then put in the order of the text. Raises ``UserError`` where the texts are too short, or where the tokenizer makes
    ids that are not in the vocabulary.
    """
    if window < 2 or tokens < 2:
        raise UserError(f"a window needs at least 2 tokens, one to read and one to score; got {window} of {tokens}")
    encoded = [
        tokenizer.encode(document, add_special_tokens=False, verbose=False)
        for text in texts
        for document in text.documents
    ]
    prefix = leading_special(tokenizer)
    check_vocabulary(prefix + [token for ids in encoded for token in ids], tokenizer, vocabulary_size)
    chosen, total = [], 0
    for document, start, ids in _by_turns(encoded, prefix, window):
        ids = ids[: tokens - total]
        if len(ids) >= 2:
            chosen.append((document, start, ids))
            total += len(ids)
        if tokens - total < 2:
            break
    if tokens - total >= 2:
        names = ", ".join(text.name for text in texts)
        raise UserError(
            f"too little text: {tokens} tokens are asked for, {names} have {total}. "
            f"Give more text{f', or ask for at most {total} tokens' if total else ''}"
        )
    windows = tuple(Window(document, np.array(ids, dtype=np.int64)) for document, _, ids in sorted(chosen))
    return Windows(windows, _sources(texts, windows))


def _by_turns(encoded: list[list[int]], prefix: list[int], window: int) -> Iterator[tuple[int, int, list[int]]]:
    step = window - len(prefix)
    for start in range(0, max(map(len, encoded), default=0), step):
        for document, ids in enumerate(encoded):
            if len(ids) > start:
                yield document, start, prefix + ids[start : start + step]


def _sources(texts: Sequence[Text], windows: Sequence[Window]) -> tuple[TextSource, ...]:
    owner = [number for number, text in enumerate(texts) for _ in text.documents]
    counts = [0] * len(texts)
    for window in windows:
        counts[owner[window.document]] += len(window.ids) - 1
    return tuple(TextSource(name=text.name, sha256=text.sha256, tokens=count) for text, count in zip(texts, counts))


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
