"""Pages of which each script writes a part: all before the first section, or one section."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

_SECTION = re.compile(r"^## (.+)\n", re.MULTILINE)


def write_head(page: Path, head: str) -> None:
    """Write all before the first section; the sections of ``page`` stay, where it has any."""
    _, sections = _parts(page)
    page.write_text("\n\n".join([head.strip(), *sections.values()]) + "\n", "utf-8")


def write_section(page: Path, section: str) -> None:
    """Write one section, a text that begins with its ``## heading``: in place of the one of that heading, or as the last."""
    found = _SECTION.match(section)
    if found is None:
        raise ValueError(f"a section begins with its heading; got {section[:40]!r}")
    head, sections = _parts(page)
    sections[found[1]] = section.strip()
    page.write_text("\n\n".join([*([head] if head else []), *sections.values()]) + "\n", "utf-8")


def _parts(page: Path) -> tuple[str, dict[str, str]]:
    """What stands before the first section, and the sections by heading, in order, all without blank ends."""
    text = page.read_text("utf-8") if page.is_file() else ""
    starts = [match.start() for match in _SECTION.finditer(text)] + [len(text)]
    pieces = [text[first:last].strip() for first, last in itertools.pairwise(starts)]
    return text[: starts[0]].strip(), {piece.partition("\n")[0].removeprefix("## "): piece for piece in pieces}
