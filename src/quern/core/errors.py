"""Errors that a user can act on.

A message says what was asked, what is allowed, what came, and what to do next. The command line turns ``UserError``
into exit code 2 and every other ``QuernError`` into exit code 1, both without a stack trace.
"""

from __future__ import annotations


class QuernError(Exception):
    """Something went wrong that is not a programming error; the message is meant for a person."""

    exit_code = 1


class UserError(QuernError, ValueError):
    """The request cannot be carried out as it was made (bad option, impossible combination, unusable input)."""

    exit_code = 2


class BadFileError(UserError):
    """A file is malformed, truncated or hostile. ``path`` names it."""

    def __init__(self, path: object, problem: str, hint: str = "") -> None:
        self.path = str(path)
        self.problem = problem
        super().__init__(f"{path}: {problem}" + (f". {hint}" if hint else ""))


class OutOfMemoryCapError(UserError):
    """The memory cap is too small for even one block. ``least_bytes`` is the smallest cap that would do."""

    def __init__(self, message: str, least_bytes: int) -> None:
        self.least_bytes = least_bytes
        super().__init__(message)
