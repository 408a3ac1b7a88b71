"""Moving a finished folder's files one by one into a folder that stays: a mount point, or one that the user made.

What says that a folder is complete goes last, and that of an older artifact goes first, so that at no moment a mixture looks
like an artifact. Everything can be repeated after a kill.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from quern.checkpoint.files import explain_write_errors, sync
from quern.core.errors import UserError, option


def publishing_order(artifact: Path, last: Sequence[str]) -> list[str]:
    """Names in ``artifact``, those of ``last`` at the end in their order."""
    places = {name: place for place, name in enumerate(last, start=1)}
    return sorted(os.listdir(artifact), key=lambda name: (places.get(name, 0), name))


def removing_order(names: Sequence[str], last: Sequence[str]) -> list[str]:
    """The other way round: what says that an older artifact is complete goes first."""
    places = {name: place for place, name in enumerate(last, start=1)}
    return sorted(names, key=lambda name: (-places.get(name, 0), name))


def move_into(
    artifact: Path, destination: Path, order: Sequence[str], replaces: Sequence[str], inside: Mapping[str, str]
) -> None:
    """Remove ``replaces`` from ``destination`` and move what is left of ``artifact`` there; goes on where it was stopped.

    ``inside``: how files of ``order`` are called in ``artifact``, where that is not their name. Raises ``UserError`` when a
    file stands in the way, when one is gone, and when the disk does not take them.
    """
    sources = {name: artifact / inside.get(name, name) for name in order}
    pending = [name for name, source in sources.items() if os.path.lexists(source)]
    with explain_write_errors(destination, 0):
        for name in replaces:
            if name in pending or name not in order:
                remove_entry(destination / name)
        sync(destination)
        for name in order:
            if name in pending:
                _move(sources[name], destination / name)
            elif not os.path.lexists(destination / name):
                raise UserError(
                    f"{destination / name} is gone, which was there already. "
                    f"Pass {option('fresh=True', '--fresh')} to start over"
                )
        sync(destination)


def remove_entry(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_moved(artifact: Path, order: Sequence[str], inside: Mapping[str, str]) -> bool:
    """Whether nothing of ``artifact`` is left to move."""
    return not any(os.path.lexists(artifact / inside.get(name, name)) for name in order)


def _move(source: Path, target: Path) -> None:
    if os.path.lexists(target):
        if not (source.is_file() and target.is_file() and filecmp.cmp(source, target, shallow=False)):
            raise UserError(f"{target} has appeared meanwhile. Move it away and run again; the work is kept")
        source.unlink()  # stopped between the last two lines below
        return
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV or not source.is_file():
            raise
        # The output folder was put on another disk after the work had begun beside it.
        temporary = target.with_name(f"{source.parent.parent.name}.tmp")
        shutil.copyfile(source, temporary)
        sync(temporary)
        os.replace(temporary, target)
        source.unlink()
