"""Write csrc/run/unicode_classes.cc and csrc/run/unicode_forms.cc: what tokenizing asks of characters.

Classes are those of the ``tokenizers`` library, asked character by character, because texts are to be cut where it cuts
them, whatever its version of Unicode is. Compositions are Python's own; a test compares what both make of texts.

    python tools/unicode_tables.py
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

FOLDER = Path(__file__).resolve().parent.parent / "csrc" / "run"
WIDTH = 125
POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
HANGUL = range(0xAC00, 0xD7A4)
"""Syllables, which are composed by a rule."""


def matching(pattern: str) -> list[int]:
    """Code points of the class ``pattern``, as the library's regular expressions have it."""
    kept = set(map(ord, normalizers.Replace(Regex(pattern), "").normalize_str("".join(map(chr, POINTS)))))
    return [point for point in POINTS if point not in kept]


def numeric() -> list[int]:
    """Code points that the library's pre-tokenizer Digits takes for digits, which is another version's class."""
    letter = "a"
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str("".join(letter + chr(p) for p in POINTS))
    return sorted({ord(piece) for piece, _ in pieces if len(piece) == 1 and piece != letter})


def ranges(points: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbours."""
    first = last = None
    for point in points:
        if last is not None and point == last + 1:
            last = point
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = point
    if first is not None and last is not None:
        yield first, last


def classes_of_combining() -> Iterator[tuple[int, int, int]]:
    """Runs of code points of one canonical combining class other than 0."""
    for number in sorted({unicodedata.combining(chr(point)) for point in POINTS} - {0}):
        for first, last in ranges(point for point in POINTS if unicodedata.combining(chr(point)) == number):
            yield first, last, number


def decompositions() -> Iterator[tuple[int, int, int]]:
    """Canonical decompositions into one (the other is 0) or two code points."""
    for point in POINTS:
        text = unicodedata.decomposition(chr(point))
        if text and not text.startswith("<") and point not in HANGUL:
            parts = [int(part, 16) for part in text.split()]
            yield point, parts[0], parts[1] if parts[1:] else 0


def composites() -> Iterator[int]:
    """Code points that composing makes of their decompositions."""
    for point, _, second in decompositions():
        if second and unicodedata.normalize("NFC", chr(point)) == chr(point):
            yield point


def table(kind: str, name: str, rows: Iterable[tuple[int, ...]]) -> str:
    """A C++ array of braced numbers, wrapped."""
    lines, line, count = [], "   ", 0
    for row in rows:
        text = f" {{{', '.join(f'{number:#x}' for number in row)}}},"
        if len(line) + len(text) > WIDTH:
            lines.append(line)
            line = "   "
        line += text
        count += 1
    return (
        f"const {kind} {name}_[] = {{\n"
        + "\n".join([*lines, line])
        + f"\n}};\nconst Table<{kind}> {name} = {{{count}, {name}_}};\n"
    )


def file(tables: Iterable[str]) -> str:
    """A source file of ``tables``."""
    head = '// Made by tools/unicode_tables.py.\n#include "run/unicode.h"\n\nnamespace quern::unicode {\n\n'
    return head + "\n".join(tables) + "\n}  // namespace quern::unicode\n"


def main() -> None:
    """Write both files."""
    classes = [
        table("Range", "LETTERS", ranges(matching(r"\p{L}"))),
        table("Range", "NUMBERS", ranges(matching(r"\p{N}"))),
        table("Range", "DIGITS", ranges(numeric())),
        table("Range", "SPACES", ranges(matching(r"\s"))),
        table("Combining", "COMBINING", sorted(classes_of_combining())),
    ]
    unmade = set(composites())
    excluded = (point for point, _, second in decompositions() if second and point not in unmade)
    forms = [
        table("Decomposition", "DECOMPOSITIONS", decompositions()),
        table("Range", "EXCLUDED", ranges(sorted(excluded))),
    ]
    (FOLDER / "unicode_classes.cc").write_text(file(classes), "utf-8")
    (FOLDER / "unicode_forms.cc").write_text(file(forms), "utf-8")


if __name__ == "__main__":
    main()
