"""Checkpoints from the Hugging Face Hub: configuration, safetensors and tokenizer files; never pickles, never code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from quern.core.errors import UserError
from quern.core.progress import Progress, telling
from quern.core.text.language import gettext

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
UNWANTED = ["*/*", "*.bin", "*.py", "consolidated*"]
"""Subfolders hold other formats of the same weights, ``consolidated*`` Mistral's second copy of them."""
TELL_S = 10.0
"""Seconds between two lines about a download."""


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form ``organization/name``."""
    return _ID.fullmatch(text) is not None


def download(repository: str, progress: Progress) -> Path:
    """The local snapshot folder of a Hub model, downloaded where it is not cached. Raises ``UserError``."""
    from huggingface_hub import snapshot_download

    progress.log(f"getting {repository} from the Hugging Face Hub")
    with explained(repository), _telling_what_came(repository, progress):
        return Path(snapshot_download(repository, allow_patterns=WANTED, ignore_patterns=UNWANTED))


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """What the Hub's library raises as ``UserError`` with the next step."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            gettext(
                "the Hub model {repository} is gated. Accept its licence on https://huggingface.co/{repository} and "
                "run `hf auth login`",
                repository=repository,
            )
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            gettext(
                "MODEL {repository!r} is neither a local folder nor a model that the Hub shows you. Check the "
                "spelling; for a private model run `hf auth login`",
                repository=repository,
            )
        ) from None
    except HFValidationError as error:
        raise UserError(
            gettext(
                "MODEL {repository!r} is neither a local folder nor a valid Hub id: {error}",
                repository=repository,
                error=error,
            )
        ) from None
    except Exception as error:
        # Network libraries raise exceptions of their own; whichever it is, the person needs the same next step.
        raise UserError(
            gettext(
                "MODEL {repository!r} is no local folder, and getting it from the Hub failed: {reason}. Check the "
                "network and the free space, or give the path of a folder; what was downloaded is kept",
                repository=repository,
                reason=first_line(error),
            )
        ) from None


def _telling_what_came(repository: str, progress: Progress) -> AbstractContextManager[None]:
    """A line now and then where there is no terminal; on one the Hub's library draws bars itself."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if sys.stderr.isatty():
        return nullcontext()
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    before = _bytes_in(folder)
    return telling(
        progress, lambda: f"getting {repository}: {(_bytes_in(folder) - before) / 1e6:,.0f} MB have come", TELL_S
    )


def _bytes_in(folder: Path) -> int:
    """On the disk; what is still being downloaded counts, and files come and go meanwhile."""
    total = 0
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                total += 512 * entry.stat().st_blocks  # a file may get its size before its bytes
    return total


def first_line(error: Exception) -> str:
    """The first line of its message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
