"""No instruction set leaks: a file compiled for one may export tables of functions and nothing else.

An inline function or a template that such a file shares with others becomes a weak symbol, of which the linker keeps any
one; where it keeps the AVX-512 version, an older processor stops with "illegal instruction". Reads the symbol tables of
all objects ``*_<instruction set>.cc.o`` below a build folder with ``nm``, but for builds with sanitizers, whose objects
export more. Exits with 1 where one exports more, or where
there is none to read.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SUFFIX = re.compile(r"_(avx2|avx512|amx|neon|i8mm)\.cc\.o(bj)?$")
SANITIZED = re.compile(r"^QUERN_SANITIZE:BOOL=(ON|1|TRUE|YES)$", re.MULTILINE | re.IGNORECASE)
"""In a build folder's CMakeCache.txt."""
DATA = frozenset("DRBG")
"""What ``nm`` calls global data; a table of functions is that."""


def exported(path: Path) -> list[tuple[str, str]]:
    """Kind (``nm``'s letter) and name of each symbol that other files can see and that ``path`` defines."""
    listing = subprocess.run(
        ["nm", "--defined-only", "--demangle", str(path)], capture_output=True, text=True, check=True
    ).stdout
    lines = (line.split(maxsplit=2) for line in listing.splitlines())
    symbols = [(line[1], line[2]) for line in lines if len(line) == 3]
    # Small letters are local, but for weak and unique ones.
    return [(kind, name) for kind, name in symbols if kind.isupper() or kind in "uvw"]


def check(folder: Path) -> tuple[int, list[str]]:
    """Objects of one instruction set below ``folder``, and a line for each that exports something else than tables."""
    caches = (path for path in folder.rglob("CMakeCache.txt") if path.parent != folder)
    left_out = {path.parent for path in caches if SANITIZED.search(path.read_text("utf-8", "replace"))}
    found = (path for path in folder.rglob("*") if SUFFIX.search(path.name))
    objects = sorted(path for path in found if left_out.isdisjoint(path.parents))
    errors = []
    for path in objects:
        symbols = exported(path)
        if not symbols or any(kind not in DATA for kind, _ in symbols):
            errors.append(
                f"{path.name} exports {', '.join(name for _, name in symbols) or 'nothing'}; tables alone are allowed"
            )
    return len(objects), errors


def main(arguments: list[str]) -> int:
    """Check the build folder that is named, or ``build`` of this repository."""
    folder = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent / "build"
    count, errors = check(folder)
    for line in errors:
        print(f"error: {line}")
    if count == 0:
        print(f"error: {folder} has no objects of an instruction set; build first, or name the build folder")
    print(f"symbols: {count} objects, {len(errors)} errors")
    return 1 if errors or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
