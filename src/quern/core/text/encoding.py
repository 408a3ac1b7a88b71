"""Bytes to text: UTF-8 with or without a byte order mark; what else it seems to be is named."""

from __future__ import annotations

from quern.core.errors import BadFileError
from quern.core.text.language import gettext

_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_SEEN = 4096
"""Bytes that are looked at."""


def foreign_encoding(head: bytes) -> str | None:
    """The encoding that ``head``, the first bytes of a text, shows to be another than UTF-8; None where it does not."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    seen = head[:_SEEN]
    # Of ASCII letters in UTF-16 every other byte is zero; UTF-8 text has none.
    return "UTF-16" if len(seen) > 3 and seen.count(0) > len(seen) // 4 else None


def not_utf8(path: object, head: bytes, position: int | None) -> BadFileError:
    """What to say of a text that begins with ``head`` and is not UTF-8 at byte ``position`` (None: all of it)."""
    encoding = foreign_encoding(head)
    if encoding is None and position is None:
        return BadFileError(path, gettext("holds zero bytes, so it is not text"), gettext("Give a text in UTF-8"))
    if encoding:
        problem = gettext("is {encoding} and not UTF-8 text", encoding=encoding)
    else:
        problem = gettext("is not UTF-8 text (byte {position})", position=position)
    known = encoding or "WINDOWS-1252"
    return BadFileError(
        path, problem, gettext("Convert it to UTF-8, for instance: iconv -f {known} -t UTF-8 OLD > NEW", known=known)
    )


def decode_utf8(path: object, raw: bytes) -> str:
    """``raw`` as text, without a byte order mark. Raises ``BadFileError`` naming the encoding; ``path`` names the text."""
    if foreign_encoding(raw[:_SEEN]):
        raise not_utf8(path, raw[:_SEEN], None)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, raw[:_SEEN], error.start) from None


def whole_characters(text: str) -> str:
    """``text`` with half characters replaced (JSON may spell one half of a pair, which no tokenizer takes)."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
