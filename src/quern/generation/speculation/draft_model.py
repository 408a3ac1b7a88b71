"""Guesses from a small model that has the tokenizer of the large one.

It chooses as the large model's text will be chosen, with the same random numbers: where both find the same tokens likely,
they choose the same ones, also with a temperature.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quern.core.engine import BatchModel
from quern.core.errors import QuernError, UserError
from quern.generation.prefixes import Prefixes, Text
from quern.generation.sampling import Sampler
from quern.generation.speculation.drafter import Asked

PROMPT_TOKENS = 256
"""Tokens of texts that it has not read yet, in one step: what bounds the pause of those that are answered meanwhile."""

KEPT = 16
"""Finished texts that it keeps for others that begin like them: conversations that go on."""


@dataclass
class _Draft:
    asked: Asked
    text: Text
    """What it has read, guesses included."""
    sampler: Sampler
    given: list[int]
    whole: bool
    """Whether it has read the whole text after ``given``."""
    proposed: list[int] = field(default_factory=list)


class DraftModel:
    """See ``speculation.drafter.Drafter``."""

    def __init__(self, model: BatchModel, vocabulary_size: int) -> None:
        """``vocabulary_size``: logits of the model that it guesses for."""
        self._model, self._vocabulary_size = model, vocabulary_size
        self._texts: dict[Hashable, Text] = {}
        self._prefixes = Prefixes(KEPT)

    def propose(self, asked: Sequence[Asked]) -> list[list[int]]:
        """For each ``count`` tokens; none while it has not read the text, or has no room for it."""
        left, drafts = PROMPT_TOKENS, []
        for one in asked:
            draft = self._begun(one, left)
            if draft is not None:
                left -= len(draft.given)
                drafts.append(draft)
        active = drafts
        while active:
            logits = self._read(active)
            if logits is None:
                break
            active = [draft for draft, row in zip(active, logits, strict=True) if self._goes_on(draft, row)]
        proposed = {id(draft.asked): draft.proposed for draft in drafts}
        return [proposed.get(id(one), []) for one in asked]

    def forget(self, key: Hashable) -> None:
        """The text is done, and stays for others that begin like it."""
        text = self._texts.pop(key, None)
        if text is not None:
            self._prefixes.keep(text)

    def _begun(self, asked: Asked, left: int) -> _Draft | None:
        """What it is to read of a text first, at most ``left`` tokens; None where that is nothing, or makes no sense."""
        if len(asked.ids) + asked.count > self._model.maximum_length or left < 1:
            return None
        text = self._texts.get(asked.key) or self._opened(asked.ids)
        if text is None:
            return None
        self._texts[asked.key] = text
        known = _common(text.ids, asked.ids)
        text.sequence.rewind(known)
        del text.ids[known:]
        pending = list(asked.ids[known:])
        given = pending[:left]
        if max(given) >= self._model.vocabulary_size:
            return None
        return _Draft(asked, text, asked.sampler.copy(), given, whole=len(given) == len(pending))

    def _opened(self, ids: Sequence[int]) -> Text | None:
        while True:
            try:
                return self._prefixes.opened(self._model, ids)
            except UserError:
                if not self._prefixes.evict():
                    return None

    def _read(self, drafts: Sequence[_Draft]) -> Tensor | None:
        """Logits after what is given to each; None where there is no room, and then their texts are forgotten."""
        try:
            logits = self._model.step([(draft.text.sequence, draft.given) for draft in drafts])
        except UserError:
            if self._prefixes.evict():
                return self._read(drafts)
            for draft in drafts:
                self._texts.pop(draft.asked.key).sequence.close()
            return None
        for draft in drafts:
            draft.text.ids += draft.given
        return logits

    def _goes_on(self, draft: _Draft, logits: Tensor) -> bool:
        """Guess one token more; whether another one is wanted."""
        if not draft.whole:
            return False
        try:
            token = draft.sampler.choose(logits[: self._vocabulary_size].numpy())
        except QuernError:  # its numbers are broken, which is no reason not to answer
            return False
        draft.proposed.append(token)
        draft.given = [token]
        return len(draft.proposed) < draft.asked.count


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with, short of all of ``second``."""
    end = min(len(first), len(second) - 1)
    if list(first[:end]) == list(second[:end]):
        return end
    return next(place for place in range(end) if first[place] != second[place])
