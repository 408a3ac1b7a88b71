"""One text continued with guesses; without them it is ``generation.generate.continuation``."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quern.core.engine import LimitedSession, SpeculativeSession
from quern.core.errors import UserError
from quern.generation.sampling import Sampler
from quern.generation.speculation.drafter import Asked
from quern.generation.speculation.speculation import Speculation


def speculated(
    session: SpeculativeSession,
    text: Sequence[int],
    count: int,
    sampler: Sampler,
    end: frozenset[int],
    speculation: Speculation,
    key: Hashable,
) -> Iterator[int]:
    """Up to ``count`` tokens after ``text``, with which ``session`` has begun; a token of ``end`` ends them and is left out.

    Between tokens the session has read no token that is not of the text. Ends early where it is full.
    """
    ids = list(text)
    while count > 0:
        room = _room(session) - len(ids)
        if room < 0:
            return
        given = ids[session.length :]
        (draft,) = speculation.propose([Asked(key, ids, min(count - 1, room), sampler)], len(given))
        rows, draft = _fed(session, given, _before(draft, end))
        chosen = _chosen(rows, draft, sampler, end)
        written = [token for token in chosen if token not in end]
        right = sum(1 for token, guess in zip(written, draft, strict=False) if token == guess)
        session.rewind(len(ids) + right)
        speculation.tell(key, len(draft), right)
        for token in written:
            ids.append(token)
            yield token
        if len(written) < len(chosen):
            return
        count -= len(written)


def _fed(session: SpeculativeSession, given: list[int], draft: list[int]) -> tuple[NDArray[np.float32], list[int]]:
    """Logits after ``given`` and each guess, and the guesses that there was room for."""
    try:
        return session.feed_drafted(given, draft).numpy(), draft
    except UserError:
        if not draft:
            raise
        return session.feed_drafted(given, []).numpy(), []


def _chosen(rows: NDArray[np.float32], draft: list[int], sampler: Sampler, end: frozenset[int]) -> list[int]:
    """Tokens chosen from logits while they are those that were guessed, the first other one included."""
    chosen: list[int] = []
    for place, row in enumerate(rows):
        if place > 0 and np.isnan(row[0]):
            break
        chosen.append(sampler.choose(row))
        if chosen[-1] in end or draft[place : place + 1] != chosen[-1:]:
            break
    return chosen


def _before(draft: list[int], end: frozenset[int]) -> list[int]:
    """``draft`` up to a token that ends the text: nothing follows it."""
    return next((draft[:place] for place, token in enumerate(draft) if token in end), draft)


def _room(session: SpeculativeSession) -> int:
    """Tokens that the session has room for."""
    return session.capacity if isinstance(session, LimitedSession) else 1 << 62
