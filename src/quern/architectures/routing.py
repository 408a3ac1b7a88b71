"""Routers; and which tokens meet an expert, said by the module that routes, heard by whoever looks at what linears read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SoftmaxRouter:
    """A router whose scores, of all experts, become weights by softmax; the greatest stay."""

    module: str
    """Relative to the block; its weight has a row for each expert."""
    renormalized: bool
    """Whether the weights that stay are divided by their sum."""
    shared_gate: str | None = None
    """The linear of one row whose sigmoid weighs an expert that every token meets; None: there is no such expert."""


class _Here(threading.local):
    """Sequences run in several threads through the same modules."""

    tokens: Tensor | None = None


_here = _Here()


@contextmanager
def routed_to(tokens: Tensor) -> Iterator[None]:
    """Inside, linears read the inputs of ``tokens`` only: positions int64 ``(n,)`` in the batch, flattened."""
    before, _here.tokens = _here.tokens, tokens
    try:
        yield
    finally:
        _here.tokens = before


def routed_tokens() -> Tensor | None:
    """The positions whose inputs the linear that runs now reads; None for all, in order."""
    return _here.tokens
