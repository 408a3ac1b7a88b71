"""What is installed and what the lock says: only where they agree are warnings errors."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
TRIED_PYTHON = (3, 11)
"""What continuous integration runs; another one may deprecate what the locked versions of others still do."""


def pinned(file: Path) -> list[Requirement]:
    """The lines of a lock that name a distribution, without their hashes."""
    lines = file.read_text("utf-8").splitlines()
    return [Requirement(line.removesuffix("\\")) for line in lines if line and line[0] not in " #-"]


def departures() -> list[str]:
    """What is installed in another version than the lock's, each with both; a Python that was not tried as well."""
    found = [] if sys.version_info[:2] == TRIED_PYTHON else [f"Python {sys.version_info[0]}.{sys.version_info[1]}"]
    installed = {canonicalize_name(one.name): one.version for one in importlib.metadata.distributions()}
    for wanted in [*pinned(REQUIREMENTS / "torch.txt"), *pinned(REQUIREMENTS / "dev.txt")]:
        version = installed.get(canonicalize_name(wanted.name))
        applies = wanted.marker is None or wanted.marker.evaluate()
        if version is not None and applies and not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} {version} (locked: {wanted.specifier})")
    return found
