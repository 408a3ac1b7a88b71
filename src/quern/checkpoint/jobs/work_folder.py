"""The work folder: where a long job keeps what it has finished, so that a killed one continues.

Layout: ``fingerprint.json`` (what the job was asked to do), ``journal.jsonl`` (one line for each finished step with the
sizes and SHA-256 of its files), ``lock`` (held while a process works here), ``progress.json`` (how far that is), and the
job's own files.

A step is finished when its line is in the journal, and its line is written after its files are on the disk. So after a
kill at any moment a step is either finished, or its files are unrecorded; opening the folder removes every unrecorded
file. A step whose files were deleted or changed afterwards counts as not done. Temporary results of step k that step
k + 1 deletes should therefore be a step of their own.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quern.checkpoint.files import explain_write_errors, read_json, sha256_of, sync, write_json
from quern.checkpoint.jobs.fingerprint import differences, read_fingerprint
from quern.checkpoint.jobs.journal import GROWS, Record, append_record, read_journal
from quern.checkpoint.jobs.lock import acquire
from quern.checkpoint.jobs.output_place import OutputFolder
from quern.checkpoint.jobs.progress_file import ProgressFile
from quern.checkpoint.jobs.publishing import is_moved, move_into, publishing_order, remove_entry, removing_order
from quern.checkpoint.safetensors_file import METADATA, read_tensors, write_safetensors
from quern.core.errors import UserError, option
from quern.core.progress import Progress

_FINGERPRINT = "fingerprint.json"
_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_PROGRESS = "progress.json"
_OWN = (_FINGERPRINT, _JOURNAL, _LOCK, _PROGRESS)
_PUBLISH = "publish"


class WorkFolder:
    """An open work folder, locked against other processes until ``close``; a context manager. Made by ``open``."""

    def __init__(self, folder: Path, lock: int, nested: str | None = None) -> None:
        self.folder, self._nested = folder, nested
        self._lock: int | None = lock
        self._steps: dict[str, Record] = {}
        self._hashed: dict[str, tuple[tuple[int, int], str]] = {}

    @classmethod
    def open(
        cls, path: str | Path, fingerprint: Mapping[str, Any], fresh: bool = False, nested: str | None = None
    ) -> WorkFolder:
        """Open or make the work folder at ``path`` for the job that ``fingerprint`` (plain JSON data) describes.

        ``fresh`` forgets what was done before. ``nested`` is the output folder of another job inside this one: it and
        names that begin with its own are left to that job. Raises ``UserError`` when another process works there, when
        the folder belongs to a job with another fingerprint (each differing entry is named), when it is not a work
        folder, or when it cannot be written.
        """
        folder = Path(os.path.abspath(path))
        _remove_leftover(folder)
        check_work_folder(folder)
        with explain_write_errors(folder, 0):
            folder.mkdir(parents=True, exist_ok=True)
            lock = acquire(folder / _LOCK, folder)
        work = cls(folder, lock, None if fresh else nested)
        try:
            with explain_write_errors(folder, 0):
                work._begin(json.loads(json.dumps(fingerprint, allow_nan=False)), fresh)
        except BaseException:
            work.close()
            raise
        return work

    def _begin(self, fingerprint: dict[str, Any], fresh: bool) -> None:
        known = self.folder / _FINGERPRINT
        if fresh:
            self._take_back()
        if fresh or not known.is_file():
            (self.folder / _JOURNAL).unlink(missing_ok=True)
        elif changed := differences(read_fingerprint(known), fingerprint):
            raise UserError(
                f"the work folder {self.folder} belongs to another job. {changed}\nRepeat the earlier command to "
                f"continue it, pass {option('fresh=True', '--fresh')} to start over, or choose another output"
            )
        self._steps = read_journal(self.folder / _JOURNAL)
        self._remove_unrecorded()
        if fresh or not known.is_file():
            write_json(known, fingerprint)

    def _remove_unrecorded(self) -> None:
        kept = {self.folder / name for name in _OWN}
        for record in self._steps.values():
            kept.update(self.folder / name for name in record.files)
        for base, folders, files in os.walk(self.folder, topdown=False):
            if self._is_nested(Path(base)):
                continue
            for name in files:
                if Path(base, name) not in kept:
                    Path(base, name).unlink()
            for name in folders:
                if Path(base, name).is_symlink():
                    Path(base, name).unlink()
                elif not any(Path(base, name).iterdir()):
                    Path(base, name).rmdir()

    def _is_nested(self, path: Path) -> bool:
        """Whether ``path`` belongs to a job inside this one."""
        parts = path.relative_to(self.folder).parts
        return self._nested is not None and bool(parts) and parts[0].startswith(self._nested)

    def telling(self, listener: Progress) -> Progress:
        """A ``Progress`` that hands on to ``listener`` and says in the folder how far the job is (see ``state_of``)."""
        return ProgressFile(self.folder / _PROGRESS, listener)

    def path(self, *parts: str) -> Path:
        """A path inside the folder; the folders on the way to it are made when it is written."""
        return self.folder.joinpath(*parts)

    def done(self, step: str) -> dict[str, Any] | None:
        """The ``data`` of a finished step whose files still have the recorded sizes and hashes, otherwise None.

        A file is hashed once; while this folder is open and the file's time stamp stays, it counts as unchanged.
        """
        record = self._steps.get(step)
        if record is None or not all(self._is_intact(name, *stored) for name, stored in record.files.items()):
            return None
        return copy.deepcopy(record.data)

    def _is_intact(self, name: str, size: int, digest: str) -> bool:
        path = self.folder / name
        if not path.is_file():
            return False
        found = path.stat().st_size
        return found >= size if digest == GROWS else found == size and self._digest(name) == digest

    def _digest(self, name: str) -> str:
        """SHA-256 of a file, read once while its time stamp stays."""
        path = self.folder / name
        stamp, digest = self._hashed.get(name, (None, ""))
        if stamp != _stamp(path):
            digest = sha256_of(path)
            self._hashed[name] = (_stamp(path), digest)
        return digest

    def finish(self, step: str, files: list[Path], data: Mapping[str, Any]) -> None:
        """Record ``step`` as finished: its ``files`` (inside the folder) and plain JSON ``data``.

        Files are synced to the disk before the line is. A step may be finished again; the last record counts. Raises
        ``UserError`` when the disk is full.
        """
        stored = {name: (size, self._digest(name)) for name, size in self._synced(files).items()}
        self._steps[step] = append_record(self.folder / _JOURNAL, step, stored, data)

    def grow(self, step: str, files: list[Path], data: Mapping[str, Any]) -> None:
        """``finish`` a step whose ``files`` are right up to their present ends, and to which later steps append.

        They are not hashed, and what stands behind those ends counts for nothing.
        """
        stored = {name: (size, GROWS) for name, size in self._synced(files).items()}
        self._steps[step] = append_record(self.folder / _JOURNAL, step, stored, data)

    def _synced(self, files: list[Path]) -> dict[str, int]:
        """Sizes of files inside the folder, by their path in it, after they and their folders are on the disk."""
        sizes = {}
        for path in files:
            inside = Path(os.path.abspath(path)).relative_to(self.folder)
            sync(path)
            for folder in inside.parents:
                sync(self.folder / folder)
            sizes[inside.as_posix()] = path.stat().st_size
        return sizes

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        """Write tensors to ``NAME.safetensors`` inside the folder, whole or not at all, and return its path."""
        path = self.path(f"{name}.safetensors")
        write_safetensors(path, tensors, METADATA)
        return path

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What ``write_tensors(name, ...)`` wrote."""
        return read_tensors(self.path(f"{name}.safetensors"))

    def publish(
        self, artifact: Path, destination: str | Path, *, last: Sequence[str] = (), replaces: Collection[str] = ()
    ) -> None:
        """Move the finished folder ``artifact`` (inside the work folder) to ``destination`` and remove the work folder.

        Where ``destination`` does not exist, the move is one rename. Into a folder that exists the files are moved one by
        one, those called ``last`` at the end in their order, after the files ``replaces`` of an older artifact were
        removed; ``finish_publishing`` goes on with that after a kill. Raises ``UserError`` when the folder holds anything
        else or cannot be written; the work folder is kept then.
        """
        destination = Path(os.path.abspath(destination))
        record: dict[str, Any] = {"artifact": artifact.relative_to(self.folder).as_posix(), "to": str(destination)}
        kept: list[Path] = []
        if os.path.lexists(destination):
            if not destination.is_dir():
                raise UserError(f"{destination} already exists. Remove it or choose another output; the work is kept")
            OutputFolder(destination, self.folder).refuse_others(
                replaces, "Move it away or choose another output folder; the work is kept"
            )
            record |= {"order": publishing_order(artifact, last), "replaces": removing_order([*replaces], last)}
            kept = sorted(path for path in artifact.rglob("*") if path.is_file())
        _sync_tree(artifact)
        self.finish(_PUBLISH, kept, record)
        if kept:
            move_into(artifact, destination, record["order"], record["replaces"], {})
        else:
            with explain_write_errors(destination, 0):
                destination.parent.mkdir(parents=True, exist_ok=True)
                os.rename(artifact, destination)
                sync(destination.parent)
        self.remove()

    def publish_file(self, file: Path, destination: Path, replaces: bool) -> None:
        """Move the finished ``file`` (inside the work folder) to ``destination`` by one rename and remove the work folder.

        Raises ``UserError`` where a file is in the way and ``replaces`` does not allow it to be replaced; the work is kept.
        """
        if os.path.lexists(destination) and not replaces:
            raise UserError(f"{destination} already exists. Remove it or choose another output; the work is kept")
        sync(file)
        self.finish(_PUBLISH, [], {"artifact": file.relative_to(self.folder).as_posix(), "to": str(destination)})
        with explain_write_errors(destination, 0):
            os.replace(file, destination)
            sync(destination.parent)
        self.remove()

    def publish_parts(self, parts: Mapping[str, Path], destination: Path, first: str, replaces: Sequence[str]) -> None:
        """Move finished files (inside one folder of the work folder), by the names that they get, into the folder of the
        file ``destination``, which they stand for together, and remove the work folder.

        The one called ``first``, by which they are opened, comes last, after all files ``replaces`` there were removed;
        ``finish_publishing`` goes on with that after a kill. Raises ``UserError`` where another file is in the way; the work
        is kept.
        """
        folder, artifact = destination.parent, next(iter(parts.values())).parent
        order = sorted(parts, key=lambda name: (name == first, name))
        for name in order:
            if os.path.lexists(folder / name) and name not in replaces:
                raise UserError(f"{folder / name} already exists. Remove it or choose another output; the work is kept")
        inside = {name: path.name for name, path in parts.items()}
        record = {
            "artifact": artifact.relative_to(self.folder).as_posix(), "to": str(folder), "stands for": str(destination),
            "order": order, "replaces": list(replaces), "inside": inside,
        }  # fmt: skip
        _sync_tree(artifact)
        self.finish(_PUBLISH, sorted(parts.values()), record)
        with explain_write_errors(destination, 0):
            folder.mkdir(parents=True, exist_ok=True)
        move_into(artifact, folder, order, list(replaces), inside)
        self.remove()

    def finish_publishing(self) -> Path | None:
        """Where ``publish`` put the artifact, if it was killed before the work folder was gone; else None.

        A publication that was stopped among its files is finished first. Raises ``UserError`` as ``publish`` does.
        """
        record = self._steps.get(_PUBLISH)
        if record is None:
            return None
        artifact, destination = self.folder / record.data["artifact"], Path(record.data["to"])
        if "order" in record.data:
            move_into(
                artifact, destination, record.data["order"], record.data["replaces"], record.data.get("inside", {})
            )
            return Path(record.data.get("stands for", destination))
        return destination if destination.exists() and not artifact.exists() else None

    def _take_back(self) -> None:
        """Remove what a publication that was stopped among its files has moved; a complete one stays."""
        data = publication(self.folder)
        if data is None:
            return
        artifact, inside = self.folder / data["artifact"], data.get("inside", {})
        if is_moved(artifact, data["order"], inside):
            return
        destination = Path(data["to"])
        for name in [*data["replaces"], *reversed(data["order"])]:
            if name in data["replaces"] or not os.path.lexists(artifact / inside.get(name, name)):
                remove_entry(destination / name)

    def remove(self) -> None:
        """Delete the work folder and release it."""
        _remove_leftover(self.folder)
        with explain_write_errors(self.folder, 0):
            os.rename(self.folder, _doomed(self.folder))
        _remove_leftover(self.folder)
        self.close()

    def close(self) -> None:
        """Let other processes use the folder; what is finished stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _doomed(folder: Path) -> Path:
    """The name that a work folder gets just before it is deleted, so that a half-deleted one is never continued."""
    return folder.with_name(f"{folder.name}.removing")


def finish_removal(folder: str | Path, destination: str | Path) -> None:
    """Delete what is left of the work folder of an artifact that stands at ``destination``, if anything.

    For a process that finds the artifact published: the one that published it may have been killed before its work
    folder was gone. A work folder that has published nothing, or elsewhere, is kept.
    """
    folder = Path(os.path.abspath(folder))
    _remove_leftover(folder)
    if (folder / _FINGERPRINT).is_file():
        with WorkFolder.open(folder, read_json(folder / _FINGERPRINT)) as work:
            if work.finish_publishing() == Path(os.path.abspath(destination)):
                work.remove()


def publication(folder: Path) -> dict[str, Any] | None:
    """What is being published file by file from ``folder`` (``artifact``, ``to``, ``order``, ``replaces``), or None."""
    if not (folder / _FINGERPRINT).is_file():
        return None
    record = read_journal(folder / _JOURNAL).get(_PUBLISH)
    return record.data if record is not None and "order" in record.data else None


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _remove_leftover(folder: Path) -> None:
    """Delete what a killed ``WorkFolder.remove`` left beside ``folder``."""
    doomed = _doomed(folder)
    if not doomed.is_dir():
        return
    entries = list(doomed.iterdir())
    if entries and not (doomed / _LOCK).is_file():
        return  # not ours
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _LOCK:
            entry.unlink(missing_ok=True)
    # The lock goes last: it is what tells a leftover from a stranger's folder.
    (doomed / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):  # another process may be deleting it too
        doomed.rmdir()


def check_work_folder(folder: Path) -> None:
    """Raise ``UserError`` where something else has the place of the work folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"the work folder {folder} cannot be made: a file of that name exists. Move it away")
    if folder.is_dir() and not (folder / _FINGERPRINT).is_file():
        strange = sorted({entry.name for entry in folder.iterdir()} - {_LOCK, f".{_FINGERPRINT}.tmp"})
        if strange:
            raise UserError(
                f"{folder} is not a quern work folder (it holds {strange[0]!r} and no {_FINGERPRINT}), so nothing in "
                "it is touched. Choose another output folder"
            )


def _sync_tree(folder: Path) -> None:
    for base, _, files in os.walk(folder):
        for name in files:
            sync(Path(base, name))
        sync(Path(base))
