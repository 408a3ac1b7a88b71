"""What can be seen of a job from outside, by its work folder: nothing is locked and nothing changed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.checkpoint.files import read_json
from quern.checkpoint.jobs.journal import parse_journal
from quern.checkpoint.jobs.lock import holder
from quern.checkpoint.jobs.progress_file import Moment, TaskState
from quern.core.errors import BadFileError


@dataclass(frozen=True)
class WorkState:
    """A job's work folder as it was when it was looked at."""

    folder: Path
    fingerprint: dict[str, Any]
    """What the job was asked to do; empty before it has begun."""
    steps: list[str]
    """Finished ones, in their order."""
    process: int | None
    """Who works there now."""
    bytes: int
    """Of all its files."""
    seconds_ago: float | None
    """Since ``tasks`` were written; None where they never were, or no clock tells."""
    tasks: list[TaskState]
    """The open ones of the last process, the outermost first."""


def is_work_folder(folder: Path) -> bool:
    """Whether a job works or has worked there."""
    return (folder / "fingerprint.json").is_file() or (
        (folder / "lock").is_file() and (folder / "progress.json").is_file()
    )


def state_of(folder: Path) -> WorkState:
    """The state of the work folder ``folder``. Raises ``BadFileError`` where its files hold something else."""
    known, journal = folder / "fingerprint.json", folder / "journal.jsonl"
    steps, _ = parse_journal(journal.read_bytes() if journal.is_file() else b"")
    ago, tasks = _progress(folder / "progress.json")
    return WorkState(
        folder,
        read_json(known) if known.is_file() else {},
        list(steps),
        holder(folder / "lock"),
        sum(_size(Path(base, name)) for base, _, names in os.walk(folder) for name in names),
        ago,
        tasks,
    )


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # the job has just removed it
        return 0


def _progress(path: Path) -> tuple[float | None, list[TaskState]]:
    if not path.is_file():
        return None, []
    try:
        content = json.loads(path.read_bytes()[:1_000_000])
        tasks = [TaskState.parse(task) for task in content.pop("tasks")]
        return Moment(**content).ago(Moment.now()), tasks
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(
            path, f"is not what a job writes there: {error}", "Remove it; the job does not need it"
        ) from None
