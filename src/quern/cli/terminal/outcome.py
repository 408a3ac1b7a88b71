"""How every verb ends: its result on stdout, or one message on stderr and an exit code.

0: done. 1: it failed (or nothing meets the constraints). 2: the request cannot be carried out as it was made.
130: interrupted from the keyboard. 143 and 129: ended by SIGTERM or SIGHUP, after everything that was started is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.text import Text

from quern.cli.terminal.progress import LineProgress, RichProgress, progress_on
from quern.cli.views.columns import UNLIMITED
from quern.core.errors import QuernError
from quern.core.text.language import english, gettext, translatable

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130
CONTINUES = translatable(" The same command continues where this one stopped.")


class Ended(BaseException):
    """The process is asked to end; raised so that worker processes and temporary files go first."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


def end_by_exception() -> None:
    """Make SIGTERM and SIGHUP raise ``Ended``; one that is ignored (nohup) stays so."""

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once: what is cleaned up is not interrupted again
        raise Ended(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


@dataclasses.dataclass
class GlobalOptions:
    """What is set before the verb."""

    debug: bool = False


global_options = GlobalOptions()


def verb(example: str, resumes: bool = False, writes_page: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function a verb: ``example`` ends its --help, and every error becomes a message and an exit code.

    ``resumes`` says that the same command continues after an interruption. With --json, the verb speaks English, since
    programs read one language, unless it ``writes_page``, which people read all the same.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            spoken = english() if kwargs.get("json") and not writes_page else contextlib.nullcontext()
            with spoken, _errors_as_messages(resumes):
                return function(*args, **kwargs)

        wrapper.example = example  # type: ignore[attr-defined]
        return wrapper

    return decorate


@contextlib.contextmanager
def _errors_as_messages(resumes: bool) -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        fail(gettext("interrupted.") + (gettext(CONTINUES) if resumes else ""), INTERRUPTED)
    except Ended as error:
        ended = gettext("ended by {signal}.", signal=error.signal.name)
        fail(ended + (gettext(CONTINUES) if resumes else ""), 128 + error.signal)
    except BrokenPipeError:
        # Whoever read stdout is gone. Python flushes it once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except QuernError as error:
        _maybe_reraise()
        fail(gettext("error: {problem}", problem=error.on_command_line), error.exit_code)
    except OSError as error:
        _maybe_reraise()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            problem = gettext("the disk is full{where}: {reason}", where=where, reason=error.strerror)
            advice = gettext(". Free some space.") + (gettext(CONTINUES) if resumes else "")
            fail(gettext("error: {problem}", problem=problem + advice), 2)
        problem = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        fail(gettext("error: {problem}", problem=problem), 1)
    except MemoryError:
        _maybe_reraise()
        fail(
            gettext("error: out of memory; give a cap with --memory where the verb has it, or close other programs"), 1
        )
    except Exception as error:
        _maybe_reraise()
        said = " ".join(str(error).split())
        fail(
            gettext(
                "internal error: {type}: {text}. This is a bug in quern: please report it with the command line, the "
                "output of `quern probe --json` and the traceback that `quern --debug ...` shows",
                type=type(error).__name__,
                text=said,
            ),
            1,
        )


def _maybe_reraise() -> None:
    if global_options.debug:
        raise


def fail(message: str, code: int) -> None:
    """Print ``message`` in red on stderr and leave with ``code``."""
    console(stderr=True).print(Text(message, style="red"), soft_wrap=True)
    raise typer.Exit(code) from None


def console(stderr: bool = False) -> Console:
    """The terminal; where there is none, lines that end where a table or a sentence ends, or at ``COLUMNS`` characters."""
    plain = Console(stderr=stderr)
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=UNLIMITED)


@contextlib.contextmanager
def _nothing_on_descriptor_1() -> Iterator[None]:
    """Libraries in C print to the file descriptor itself, which is that of stderr meanwhile."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        library.fflush(None)  # what C has buffered belongs to where it was printed
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def working() -> Iterator[RichProgress | LineProgress]:
    """Progress; and whatever a library prints meanwhile goes to stderr, so that stdout holds the result alone."""
    with (
        _nothing_on_descriptor_1(),
        contextlib.redirect_stdout(sys.stderr),
        progress_on(console(stderr=True)) as progress,
    ):
        yield progress


def say(message: str, stderr: bool = False) -> None:
    """Print a line as it is, without reading markup into it."""
    console(stderr).print(Text(message), soft_wrap=True)


def tell(note: str) -> None:
    """Print a note to stderr."""
    say(gettext("note: {note}", note=note), stderr=True)


def show(result: object, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print ``result`` as JSON, or what ``render`` makes of it for a person."""
    if as_json:
        print(json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        console().print(render(result), crop=False)


def plain(value: Any) -> Any:
    """``value`` as what JSON knows: dataclasses and models become objects, paths strings."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
