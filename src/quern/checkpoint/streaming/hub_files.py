"""Single files of the Hub: gone on with where a run left off, held to their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.checkpoint.files import explain_write_errors, sha256_into
from quern.checkpoint.hub import first_line
from quern.core.errors import BadFileError, UserError
from quern.core.text.units import bytes_text

_SPARE = 64 << 20
"""Bytes that stay free on the disk."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision of a Hub model, and what the Hub says of it."""

    repository: str
    revision: str
    name: str
    size: int
    sha256: str | None
    git_sha1: str | None
    """Of files in git: SHA-1 over ``blob SIZE``, a zero byte and the content."""

    def part(self, folder: Path) -> Path:
        """What of it has come."""
        return folder / f".{self.name}.part"


def endpoint() -> str | None:
    """The Hub's address where another one is set."""
    return os.environ.get("HF_ENDPOINT") or None


def fetch(file: RemoteFile, folder: Path) -> Path:
    """``file`` in ``folder``. Raises ``UserError`` where it does not come or fit, ``BadFileError`` where it is another."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get

    path, part = folder / file.name, file.part(folder)
    url = hf_hub_url(file.repository, file.name, revision=file.revision, endpoint=endpoint())
    with explain_write_errors(part, file.size):
        folder.mkdir(parents=True, exist_ok=True)
        come = part.stat().st_size if part.exists() else 0
        if come > file.size:
            part.unlink()
            come = 0
        free = shutil.disk_usage(folder).free
        if (needed := file.size - come) + _SPARE > free:
            raise UserError(
                f"not enough room for {file.name} of {file.repository} in {folder}: {bytes_text(needed)} are needed and "
                f"{bytes_text(free)} are free. Free some space, or set XDG_CACHE_HOME to a folder on another disk"
            )
        try:
            with open(part, "r+b" if come else "wb") as target:
                target.seek(come)
                headers = _library().build_hf_headers()
                known: dict[str, Any] = {
                    "resume_size": come,
                    "expected_size": file.size,
                    "tqdm_class": _library().silent_tqdm,
                }
                http_get(url, target, headers=headers, **known)
        except OSError as error:
            if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
                raise
            raise _broken_off(file, part, error) from None
        except Exception as error:  # network libraries raise exceptions of their own
            raise _broken_off(file, part, error) from None
    _check(file, part)
    os.replace(part, path)
    return path


def _broken_off(file: RemoteFile, part: Path, error: Exception) -> UserError:
    come = part.stat().st_size if part.exists() else 0
    return UserError(
        f"getting {file.name} of {file.repository} broke off at {bytes_text(come)} of {bytes_text(file.size)}: "
        f"{first_line(error)}. Check the network and run the same command again: what has come is kept"
    )


def _check(file: RemoteFile, part: Path) -> None:
    """Hold what has come to its size and hash; remove it where it is another file."""
    digest, wanted = (hashlib.sha256(), file.sha256) if file.sha256 else (hashlib.sha1(), file.git_sha1)
    if not file.sha256:
        digest.update(f"blob {file.size}\0".encode())
    sha256_into(digest, part)
    if part.stat().st_size != file.size or digest.hexdigest() != wanted:
        part.unlink()
        raise BadFileError(
            part.with_name(file.name),
            f"of {file.repository} came with the hash {digest.hexdigest()[:16]}..., and the Hub says {str(wanted)[:16]}...",
            "Run the same command again; if it comes like this again, the server or something in between changes it",
        )


def _library() -> Any:
    """It does not say what it exports."""
    from huggingface_hub import utils

    return utils
