"""Errors that a user can act on.

A message says what was asked, what is allowed, what came, and what to do next. The command line turns ``UserError``
into exit code 2 and every other ``QuernError`` into exit code 1, both without a stack trace.

Functions and commands have options of the same meaning and other spellings. A message that names one does it by ``option``:
``str(error)`` then speaks to whoever called the function, ``error.on_command_line`` to whoever typed the command.
"""

from __future__ import annotations

import re

from quern.core.text.language import gettext

_OPTION = re.compile("\x02([^\x02\x03\x1f]*)\x1f([^\x02\x03\x1f]*)\x03")


def option(python: str, command: str) -> str:
    """An option inside the message of a ``QuernError``: ``option("fresh=True", "--fresh")``."""
    return f"\x02{python}\x1f{command}\x03"


class QuernError(Exception):
    """Something went wrong that is not a programming error; the message is meant for a person."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        self.message = message
        """With both spellings of every option: what an error that passes this one on begins from."""
        super().__init__(_OPTION.sub(r"\1", message))

    @property
    def on_command_line(self) -> str:
        """The message with the options of the command line."""
        return _OPTION.sub(r"\2", self.message)


class UserError(QuernError, ValueError):
    """The request cannot be carried out as it was made (bad option, impossible combination, unusable input)."""

    exit_code = 2


class BadFileError(UserError):
    """A file is malformed, truncated or hostile. ``path`` names it."""

    def __init__(self, path: object, problem: str, hint: str = "") -> None:
        self.path = str(path)
        self.problem = problem
        told = {"path": path, "problem": gettext(problem)}
        super().__init__(
            gettext("{path}: {problem}. {hint}", **told, hint=gettext(hint))
            if hint
            else gettext("{path}: {problem}", **told)
        )


class OutOfMemoryCapError(UserError):
    """The memory cap is too small for even one block. ``least_bytes`` is the smallest cap that would do."""

    def __init__(self, message: str, least_bytes: int) -> None:
        self.least_bytes = least_bytes
        super().__init__(message)


class NotEnoughDiskError(UserError):
    """The disk has not room for the work. ``missing_bytes`` more would do. What was finished is kept."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        self.missing_bytes = missing_bytes
        super().__init__(message)


class UnhealthyError(UserError):
    """What came of a block is not fit for use, and the job was to stop there. What was finished is kept."""
