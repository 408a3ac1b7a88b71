"""What the other tools' environments are made of: for each adapter a lock beside its file, in the form that pip reads.

``locks/NAME.txt`` names every distribution but torch with its exact version and the hashes of its files, for Python 3.11
and newer; ``make lock-peers`` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from packaging.utils import canonicalize_name

LOCKS = Path(__file__).parent / "locks"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def lock_of(peer: str) -> str:
    """The text of the lock of the adapter called ``peer``. Raises ``FileNotFoundError``."""
    return (LOCKS / f"{peer}.txt").read_text("utf-8")


def split(text: str, sources: Collection[str]) -> tuple[str, str]:
    """``text`` without the distributions ``sources`` (PEP 503's spelling), and these alone."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    of_sources = False
    for line in text.splitlines(keepends=True):
        if named := _NAME.match(line):  # hashes follow it, indented
            of_sources = canonicalize_name(named.group()) in sources
        parts[of_sources].append(line)
    return "".join(parts[False]), "".join(parts[True])
