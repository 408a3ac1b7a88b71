"""The part of the corpus that is split GGUF: a good model in two files, of which one lies about itself or the other."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
from bad_files.corpus import CONFIG, Case, gguf_name, weights, write_gguf

CASES: list[Case] = []
FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
HALF = len(weights()) // 2


def good_split(folder: Path) -> tuple[Path, Path]:
    """A whole llama in two files."""
    tensors = weights()
    names = list(tensors)
    paths = (folder / FIRST, folder / SECOND)
    for number, chosen in enumerate((names[:HALF], names[HALF:])):

        def extra(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", len(names))

        write_gguf(paths[number], {name: tensors[name] for name in chosen}, CONFIG, extra=extra)
    return paths


def lie(name: str, says: str, change: Callable[[Path, Path], object], names: str = "m-0000", opened: int = 0) -> None:
    """Register a case: ``change`` spoils the two good files, of which one is given as MODEL."""

    def build(folder: Path) -> Path:
        paths = good_split(folder)
        change(*paths)
        return paths[opened]

    CASES.append(Case(f"split GGUF: {name}", build, names, says))


def set_value(path: Path, key: bytes, form: str, value: object) -> None:
    """Write ``value`` over the number of a metadata entry."""
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, raw.index(key) + len(key) + 4, value)
    path.write_bytes(raw)


def set_kind(path: Path, key: bytes, kind: int) -> None:
    """Write another value type over that of a metadata entry."""
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(key) + len(key), kind)
    path.write_bytes(raw)


lie("the other part is missing", f"of which {SECOND} is missing", lambda one, two: two.unlink())
lie("the first part is missing", f"of which {FIRST} is missing", lambda one, two: one.unlink(), SECOND, 1)
lie("65535 parts", "at most 10000", lambda one, two: set_value(one, b"split.count", "<H", 65535))
lie("one part of three", "name must end in", lambda one, two: set_value(one, b"split.count", "<H", 3))
lie("a number beyond the count", "name must end in", lambda one, two: set_value(one, b"split.no", "<H", 7))
lie("another number than the name's", "unlike its name", lambda one, two: set_value(two, b"split.no", "<H", 0), SECOND)
lie("a count below 0", "must be a number", lambda one, two: (
    set_kind(one, b"split.count", 3), set_value(one, b"split.count", "<h", -2)))  # fmt: skip
lie("a count that is a truth value", "", lambda one, two: set_kind(one, b"split.count", 7))
lie("more tensors in all", "all parts hold", lambda one, two: set_value(one, b"split.tensors.count", "<i", 2**31 - 1))
lie("fewer tensors than none", "must be a number", lambda one, two: set_value(one, b"split.tensors.count", "<i", -1))
lie("both parts the first", "", lambda one, two: two.write_bytes(one.read_bytes()))
lie("a part that is empty", "not a GGUF", lambda one, two: two.write_bytes(b""), SECOND)
lie("a part that is cut", "", lambda one, two: two.write_bytes(two.read_bytes()[:-100]), SECOND)
lie("a part that is a folder", "missing", lambda one, two: (two.unlink(), two.mkdir()))


def _same_tensor(one: Path, two: Path) -> None:
    raw = bytearray(two.read_bytes())
    mine, theirs = (gguf_name(list(weights())[place]).encode() for place in (-1, 1))
    at = raw.rindex(mine)
    del raw[at - 8 : at + len(mine)]
    raw[at - 8 : at - 8] = struct.pack("<Q", len(theirs)) + theirs
    two.write_bytes(raw)


lie("a tensor in both", "", _same_tensor)
