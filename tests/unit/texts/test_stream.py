"""Bytes to characters: byte order marks, other encodings, line ends, gzip, damage."""

import gzip
import lzma
import os
import random

import pytest

from quern.core.errors import BadFileError
from quern.core.text.encoding import decode_utf8, whole_characters
from quern.texts import stream
from quern.texts.stream import characters, first_bytes, lines

TEXT = "Grüße\r\nyou 你好 \U0001f600\nend"


@pytest.fixture
def write(tmp_path):
    def function(raw, name="text.txt"):
        (tmp_path / name).write_bytes(raw)
        return tmp_path / name

    return function


def whole(path, **options):
    return "".join(characters(path, **options))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_utf8_with_and_without_a_mark_plain_and_gzipped(write, mark, pack):
    path = write(pack(mark + TEXT.encode()))
    assert whole(path) == TEXT
    assert whole(path, translate=True) == TEXT.replace("\r\n", "\n")
    assert first_bytes(path, 4) == (mark + TEXT.encode())[:4]


def test_characters_and_line_ends_may_be_cut_anywhere(write, monkeypatch):
    path = write(b"\xef\xbb\xbf" + TEXT.encode())
    for size in range(1, 12):
        monkeypatch.setattr(stream, "CHUNK", size)
        assert whole(path) == TEXT
        assert whole(path, translate=True) == TEXT.replace("\r\n", "\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_other_encodings_are_named(write, encoding):
    path = write(("Some words.\n" * 9).encode(encoding))
    named = "UTF-32" if encoding == "utf-32" else "UTF-16"
    with pytest.raises(BadFileError, match=f"is {named} and not UTF-8.*iconv -f {named} -t UTF-8"):
        whole(path)
    with pytest.raises(BadFileError, match=f"is {named}"):
        decode_utf8("it", path.read_bytes())


def test_the_first_wrong_byte_is_named_also_behind_the_first_piece(write, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 7)
    for position in (0, 5, 20, 33):
        raw = "aé".encode() * 20
        raw = raw[: position * 3 // 3] + b"\xff" + raw[position:] if position % 3 == 0 else raw
        if position % 3 == 0:
            with pytest.raises(BadFileError, match=rf"is not UTF-8 text \(byte {position}\)"):
                whole(write(raw))
    with pytest.raises(BadFileError, match=r"is not UTF-8 text \(byte 9\)"):
        whole(write(b"cut short" + "é".encode()[:1]))


def test_zero_bytes_are_no_text(write):
    with pytest.raises(BadFileError, match="zero bytes"):
        whole(write(b"abc" * 100 + b"\0"))


def test_what_is_no_file_or_in_another_compression(write, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadFileError, match=r"cannot be read: No such file|is not a regular file"):
            first_bytes(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFileError, match="not a regular file"):
        first_bytes(tmp_path / "pipe")
    with pytest.raises(BadFileError, match="compressed by xz"):
        first_bytes(write(lzma.compress(b"text")))


def test_damaged_gzip(write):
    raw = bytearray(gzip.compress(random.Random(0).randbytes(5000).hex().encode()))
    for damaged in (raw[:-2000], raw[:1000] + bytes(200) + raw[1200:], raw[:-8] + bytes(8), raw[:12]):
        with pytest.raises(BadFileError, match="is damaged gzip"):
            whole(write(bytes(damaged)))


def test_lines_however_they_are_cut(monkeypatch):
    text = "one\ntwo\n\nthree"
    for size in range(1, 14):
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(lines(iter(parts))) == ["one\n", "two\n", "\n", "three"]
    monkeypatch.setattr(stream, "LINE_LIMIT", 10)
    assert list(lines(iter(["a" * 8, "b" * 8, "c\nd"]))) == ["a" * 8 + "b" * 8, "c\n", "d"]


def test_half_characters_are_replaced_and_pairs_joined():
    assert whole_characters("a\ud83d b") == "a\ufffd b"
    assert whole_characters("\ud83d\ude00") == "\U0001f600"
    assert whole_characters(TEXT) is TEXT
