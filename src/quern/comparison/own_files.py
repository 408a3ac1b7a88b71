"""Which files in the folder of a comparison quern wrote, and may therefore replace."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from quern.checkpoint.files import explain_write_errors, read_json
from quern.core.errors import BadFileError, UserError

_RESULTS_KEYS = {"metrics_version", "quern_version", "rows"}
_RECORD_KEY = "artifact_sha256"
_RESULTS_LIMIT = 256 << 20
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# A cache of quern compare (https://bford.info/cachedir/).\n"
"""What tells programs that make backups that the folder can be made again, and quern that it is its own."""
_CACHED = (
    "windows.npz",
    "options.npz",
    "measured",
    "lock",
    "reference-*",
    "token-weights-*",
    "calibration-*",
    ".*.tmp",
)
"""What lies in a cache folder that was made before there was a tag."""


def mark_cache(cache: Path) -> None:
    """Leave the tag in a cache folder."""
    (cache / _TAG).write_bytes(_TAG_TEXT)


def check_cache(cache: Path) -> None:
    """Raise ``UserError`` where ``cache`` has no tag and holds what quern does not put into it."""
    if not cache.is_dir() or (cache / _TAG).is_file():
        return
    with explain_write_errors(cache, 0):
        strange = [name for name in os.listdir(cache) if not any(fnmatch(name, known) for known in _CACHED)]
    if strange:
        raise not_ours(cache / min(strange))


def is_results(path: Path) -> bool:
    """Whether ``quern compare`` of any version wrote the file."""
    return _has_keys(path, _RESULTS_KEYS)


def is_record(path: Path) -> bool:
    """Whether the file is what a comparison notes beside an artifact."""
    return _has_keys(path, {_RECORD_KEY})


def _has_keys(path: Path, keys: set[str]) -> bool:
    try:
        return keys <= set(read_json(path, _RESULTS_LIMIT))
    except BadFileError:
        return False


def not_ours(path: Path) -> UserError:
    """The error for something that is in the way."""
    return UserError(f"{path} exists and was not written by quern. Move it away or choose another output folder")
