"""How far the jobs of an output are, as their work folders tell: for whoever comes back to a long one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from quern.checkpoint.jobs.output_place import BESIDE
from quern.checkpoint.jobs.progress_file import TaskState
from quern.checkpoint.jobs.work_state import WorkState, is_work_folder, state_of
from quern.core.errors import UserError
from quern.core.text.language import gettext

_DEPTH = 4
"""How far below an output jobs are looked for: a comparison's are in folders of its own."""
_FINISHED = ("quern.json", "results.json")
"""What lies in a finished artifact or comparison."""


@dataclass(frozen=True)
class TaskStatus:
    """One bar of a job."""

    description: str
    done: float
    total: float
    seconds: float
    """Since it began in this run."""
    seconds_left: float | None
    """By what its steps have taken in this run; None before the first one, and where nobody works on it."""


@dataclass(frozen=True)
class JobStatus:
    """One job that is not finished."""

    folder: Path
    """Its work folder."""
    output: Path
    recipe: str | None
    blocks: int
    """Decoder blocks that are quantized."""
    last_step: str | None
    """The last that need not be done again."""
    bytes: int
    """Of the work folder."""
    process: int | None
    """Who works on it now; None where nobody does."""
    seconds_ago: float | None
    """When the tasks were written; None where no clock tells."""
    tasks: list[TaskStatus]
    """What is in hand, or was when the last process ended; the outermost first."""


@dataclass(frozen=True)
class Status:
    """What is known of an output."""

    path: Path
    finished: bool
    """Whether an artifact or a comparison stands there."""
    jobs: list[JobStatus]


def status(path: str | Path) -> Status:
    """How far the jobs are that write ``path`` (a folder, a file, a work folder, or a folder with such); nothing is changed.

    Raises ``UserError`` where there is neither a job nor a result, ``BadFileError`` for a damaged work folder.
    """
    place = Path(os.path.abspath(os.path.expanduser(path)))
    folders = _work_folders(place)
    finished = (place.is_file() and place.suffix == ".gguf") or any((place / name).is_file() for name in _FINISHED)
    if not folders and not finished:
        raise UserError(
            gettext(
                "nothing is known of {path}: there is no {name}{beside}, and no artifact or comparison. Give the "
                "output (-o) of a `quern quantize`, `train`, `export` or `compare`",
                path=path,
                name=place.name,
                beside=BESIDE,
            )
        )
    return Status(place, finished, [_job(state_of(folder)) for folder in folders])


def _work_folders(place: Path) -> list[Path]:
    """Of the output itself and below it, sorted."""
    found = [folder for folder in (place, place.with_name(f"{place.name}{BESIDE}")) if is_work_folder(folder)]
    for base, folders, _ in os.walk(place):
        if len(Path(base).relative_to(place).parts) >= _DEPTH:
            folders.clear()
        found += [Path(base, name) for name in folders if name.endswith(BESIDE) and is_work_folder(Path(base, name))]
    return sorted(set(found))


def _job(state: WorkState) -> JobStatus:
    recipe = state.fingerprint.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else None
    inside = state.folder.name == BESIDE
    return JobStatus(
        folder=state.folder,
        output=state.folder.parent if inside else state.folder.with_name(state.folder.name.removesuffix(BESIDE)),
        recipe=name if isinstance(name, str) else None,
        blocks=sum(step.startswith("block ") for step in state.steps),
        last_step=state.steps[-1] if state.steps else None,
        bytes=state.bytes,
        process=state.process,
        seconds_ago=state.seconds_ago,
        tasks=[TaskStatus(t.description, t.done, t.total, t.seconds, _left(t, state)) for t in state.tasks],
    )


def _left(task: TaskState, state: WorkState) -> float | None:
    """Since it was written down, time went by."""
    if task.left is None or state.process is None:
        return None
    return max(0.0, task.left - (state.seconds_ago or 0.0))
