"""What a command is given as a stream: its standard descriptors, and texts that come through a pipe."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import typer

from quern.core.errors import UserError
from quern.core.machine.temporary import ELSEWHERE, temporary_folder
from quern.core.text.language import gettext


def open_standard() -> None:
    """Give standard descriptors that are closed to the null device; the next file that is opened would become them."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 (for the process's whole life)


def forget_impossible_width() -> None:
    """Drop a ``COLUMNS`` that is no width, such as the 0 of terminals that do not know theirs: nothing would be shown."""
    columns = os.environ.get("COLUMNS", "1")
    if not columns.isdecimal() or int(columns[:9]) == 0:
        del os.environ["COLUMNS"]


def kept_pipes(context: typer.Context, paths: list[Path] | None) -> list[Path] | None:
    """``paths``, with a file that lives as long as the command in place of each pipe: texts are read more than once."""
    return [_kept(context, path) if stat.S_ISFIFO(path.stat().st_mode) else path for path in paths or ()] or None


def _kept(context: typer.Context, pipe: Path) -> Path:
    try:
        kept = context.with_resource(temporary_folder("pipe")) / pipe.name
        with pipe.open("rb") as source, kept.open("wb") as file:
            shutil.copyfileobj(source, file)
    except UserError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        context.close()  # which nobody does for a command whose arguments are refused
        reason = error.strerror or error
        raise typer.BadParameter(
            gettext(
                "{pipe} cannot be kept in a file: {reason}. Free some space, or {elsewhere}",
                pipe=pipe,
                reason=reason,
                elsewhere=gettext(ELSEWHERE),
            )
        ) from error
    return kept
