"""Many texts at once: what a model writes behind each of many beginnings."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quern.core.engine import BatchModel
from quern.core.errors import UserError
from quern.core.seeds import derive_seed
from quern.generation.sampling import Sampler, SamplingOptions

PARALLEL = 16
"""Texts that grow at the same time: one pass over the weights gives each its next token."""


@dataclass
class _Growing:
    number: int
    sequence: Any
    pending: list[int]
    sampler: Sampler
    written: list[int] = field(default_factory=list)


def continuations(
    model: BatchModel,
    beginnings: Sequence[list[int]],
    counts: Sequence[int],
    options: SamplingOptions,
    ends: frozenset[int],
    seed: int,
    first: int = 0,
) -> Generator[list[int], None, None]:
    """What ``model`` writes behind each of ``beginnings`` from number ``first`` on, in their order.

    Beginning i gets up to ``counts[i]`` tokens; one of ``ends`` is the last. Each text has random numbers of its own, by
    ``seed`` and i, so that it is the same whichever texts grow beside it. Where memory has no room for ``PARALLEL`` of them,
    fewer grow at a time. Raises ``UserError`` where it has none for one.
    """
    waiting = deque(range(first, len(beginnings)))
    growing: list[_Growing] = []
    done: dict[int, list[int]] = {}
    most, following = PARALLEL, first
    while waiting or growing:
        while waiting and len(growing) < most:
            number = waiting[0]
            try:
                sequence = model.open()
            except UserError:
                if not growing:
                    raise
                most = len(growing)
                break
            waiting.popleft()
            sampler = Sampler(options, derive_seed(seed, "continuation", number))
            growing.append(_Growing(number, sequence, beginnings[number], sampler))
        try:
            logits = model.step([(one.sequence, one.pending) for one in growing]).numpy()
        except UserError:
            if len(growing) == 1:
                raise
            last = growing.pop()  # it begins again later, with the same random numbers
            last.sequence.close()
            waiting.appendleft(last.number)
            most = len(growing)
            continue
        for one, row in zip(growing, logits, strict=True):
            token = one.sampler.choose(row)
            one.written.append(token)
            one.pending = [token]
            if token in ends or len(one.written) >= counts[one.number]:
                one.sequence.close()
                done[one.number] = one.written
        growing = [one for one in growing if one.number not in done]
        while following in done:
            yield done.pop(following)
            following += 1
