"""Texts: named documents, from memory or from a file of plain text, JSON, CSV or Parquet, also gzipped.

A *document* is what an interval is resampled over: a file of plain text, an article of WikiText, or a record. It comes as
strings that join to it, so that a text of any size can be read; each ``read`` goes through the file anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quern.checkpoint.files import sha256_of
from quern.core.errors import BadFileError, UserError
from quern.core.text.encoding import whole_characters
from quern.texts.csv_records import csv_records
from quern.texts.json_records import json_records
from quern.texts.parquet_records import parquet_records
from quern.texts.records import KNOWN, Chat, Form, RecordError, form_of, record_texts
from quern.texts.stream import characters, first_bytes, lines

_FORMATS = {
    "json": "JSON",
    "jsonl": "JSON",
    "ndjson": "JSON",
    "csv": "CSV",
    "tsv": "CSV",
    "parquet": "Parquet",
    "pq": "Parquet",
}
"""By the ending of a file's name; any other is plain text."""
_PARQUET_MAGIC = b"PAR1"

_HEADING = re.compile(r" ?= (?!=)[^\n]*(?<!=) = ?")
"""`` = Title = `` of WikiText; deeper headings have `` = = Title = = ``."""
_COLUMNS = re.compile(r"[\w .-]{1,40}([,;\t][\w .-]{1,40})+")


class Reading:
    """One pass over a text's documents; ``note`` says what was taken until now."""

    def __init__(self, text: TextFile | Text, chat: Chat | None, articles: bool) -> None:
        self._text, self._chat, self._articles = text, chat, articles
        self._form: Form | None = None
        self._records = self._empty = 0
        self._whole = False

    def __iter__(self) -> Iterator[Iterable[str]]:
        """The documents that are not blank, each as strings that join to it."""
        if isinstance(self._text, Text):
            yield from ((document,) for document in self._text.documents)
        elif self._text.format == "text":
            yield from self._text.plain(self._articles)
        else:
            yield from self._recorded(self._text)

    def _recorded(self, text: TextFile) -> Iterator[Iterable[str]]:
        try:
            for string in record_texts(text.records(), self._chat, self._found):
                blank = not string.strip()
                self._records, self._empty = self._records + (not blank), self._empty + blank
                if not blank:
                    yield (whole_characters(string),)
        except RecordError as error:
            raise BadFileError(text.path, str(error)) from None
        self._whole = True
        if not self._records:
            raise BadFileError(text.path, "holds no text", f"Of records {KNOWN}")

    def _found(self, form: Form) -> None:
        self._form = form

    @property
    def note(self) -> str | None:
        """What was taken of a file of records, and what a plain text looks like if it looks like records."""
        if isinstance(self._text, Text):
            return None
        if self._text.format == "text":
            return self._text.suspicion
        if self._form is None:
            return None
        records = "1 record" if self._records == 1 else f"{self._records} records"
        count = records if self._whole else f"the first {records}"
        left_out = f", {self._empty} empty ones left out" if self._empty else ""
        return f"{self._text.name}: {self._text.format}, {self._form.how}, {count}{left_out}"


@dataclass(frozen=True)
class Text:
    """A named text in memory. ``sha256`` is that of its documents as a JSON list."""

    name: str
    documents: tuple[str, ...]
    sha256: str

    @classmethod
    def of(cls, name: str, documents: Iterable[str]) -> Text:
        """A text that lies in memory. Raises ``UserError`` if nothing but white space is in it."""
        strings = [whole_characters(document) for document in documents if document.strip()]
        if not strings:
            raise UserError(f"text {name!r} is empty; give some text")
        return cls(name, tuple(strings), hashlib.sha256(json.dumps(strings).encode()).hexdigest())

    def read(self, chat: Chat | None = None, *, articles: bool = True) -> Reading:
        """Go through the documents."""
        return Reading(self, chat, articles)


class TextFile:
    """A file of text. ``sha256`` is that of its bytes as they lie on the disk.

    Raises ``BadFileError`` for what cannot be read, is not UTF-8, holds no text, or has a structure that is not known.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._head = first_bytes(self.path)
        self.format = self._format()
        """``text``, ``JSON``, ``CSV`` or ``Parquet``."""

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal, of the file's bytes."""
        return sha256_of(self.path)

    def read(self, chat: Chat | None = None, *, articles: bool = True) -> Reading:
        """Go through the documents; ``chat`` writes conversations out, ``articles`` cuts WikiText at its headings."""
        return Reading(self, chat, articles)

    def _format(self) -> str:
        if self._head.startswith(_PARQUET_MAGIC):
            return "Parquet"
        names = self.name.lower().split(".")
        ending = names[-2] if names[-1] == "gz" and len(names) > 1 else names[-1]
        known = _FORMATS.get(ending, "text") if len(names) > 1 else "text"
        if known == "Parquet":
            raise BadFileError(self.path, "is named as Parquet, but does not begin as such", "Give the file itself")
        return "JSON" if known == "text" and self._begins_with_a_record() else known

    def _begins_with_a_record(self) -> bool:
        """Whether a file with the name of a plain text holds records in JSON of a known form."""
        start = self._first_characters().lstrip()
        if not start.startswith(("{", "[")):
            return False
        try:
            record = next(json_records(self.path, iter([start])), None)
            return isinstance(record, dict) and form_of(record, None) is not None
        except (BadFileError, RecordError):
            return False

    def _first_characters(self) -> str:
        return self._head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "ignore")

    @cached_property
    def suspicion(self) -> str | None:
        """What a plain text looks like, if it looks like records."""
        first = self._first_characters().lstrip().split("\n", 1)[0].rstrip()
        if first.startswith(("{", '["', "[{")):
            looks = "JSON"
        elif _COLUMNS.fullmatch(first) and form_of(dict.fromkeys(re.split("[,;\t]", first)), None):
            looks = "a table; name it .csv to have its fields taken"
        else:
            return None
        return f"{self.name}: taken as plain text, although its first line looks like {looks}"

    def records(self) -> Iterator[Any]:
        """The records of a file that is no plain text."""
        if self.format == "Parquet":
            return parquet_records(self.path)
        strings = characters(self.path)
        if self.format == "JSON":
            return json_records(self.path, strings)
        return csv_records(self.path, strings, tabs=".tsv" in self.path.suffixes)

    def plain(self, articles: bool) -> Iterator[Iterable[str]]:
        """The articles of WikiText, or the whole text as one document."""
        strings = characters(self.path, translate=True)
        held: list[str] = []
        for string in strings:  # blank ones in front are held, because a blank text is none
            held.append(string)
            if string.strip():
                break
        else:
            raise BadFileError(self.path, "holds no text", "Give a file with text")
        first = "".join(held).lstrip("\n ").split("\n", 1)[0]
        whole = _chain(held, strings)
        if articles and _HEADING.fullmatch(first.rstrip() + " "):
            yield from split_articles(whole)
        else:
            yield whole


def _chain(held: list[str], strings: Iterator[str]) -> Iterator[str]:
    yield from held
    yield from strings


def split_articles(strings: Iterator[str]) -> Iterator[Iterable[str]]:
    """WikiText cut at its top-level headings; each article as its lines, to be taken before the next one is asked for."""
    rows, heading = lines(strings), ""
    ended = False

    def article() -> Iterator[str]:
        nonlocal heading, ended
        begun = bool(heading)
        if heading:
            yield heading
        for row in rows:
            if _HEADING.fullmatch(row.removesuffix("\n")):
                if begun:
                    heading = row
                    return
                begun = True
            yield row
        ended = True

    while not ended:
        current = article()
        yield current
        for _ in current:  # what was not wanted of it
            pass


def read_text(path: str | Path) -> TextFile:
    """The text in a file: plain, JSON, CSV or Parquet, by its name and its first bytes. Raises ``BadFileError``."""
    return TextFile(path)


def each(given: Iterable[Any] | str | Path) -> list[Any]:
    """The items of ``given``; a path on its own is one item, and no sequence of letters."""
    return [given] if isinstance(given, str | Path) else list(given)
