"""Panics of libraries written in Rust, such as tokenizers', as errors that can be handled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise ``RuntimeError`` for a panic, which otherwise passes by every ``except Exception`` and ends the program."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, which has no place that it could be imported from
            raise
        raise RuntimeError(str(error)) from None
