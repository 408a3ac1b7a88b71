"""One request on its way: from the logits of its sequence to the events that its client gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from quern.generation.detokenize import Detokenizer
from quern.generation.prefixes import Text
from quern.generation.sampling import Sampler
from quern.generation.speculation.drafter import Asked
from quern.serving.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Piece,
    TokenProbability,
    Usage,
)
from quern.serving.stops import StopTexts

Tell = Callable[[Event], None]


class Running:
    """A request and what has become of it."""

    def __init__(
        self, request: GenerationRequest, tell: Tell, decode: Callable[[list[int]], str], ends: frozenset[int]
    ):
        self.request, self._tell = request, tell
        self._ends = frozenset() if request.ignore_end else ends
        self._sampler = Sampler(request.sampling, request.seed)
        self._detokenizer = Detokenizer(decode, request.ids)
        self._stops = StopTexts(request.stop)
        self._grammar = None if request.grammar is None else request.grammar()
        self._counts: Counter[int] = Counter()
        self._unsaid: list[TokenProbability] = []
        self.written: list[int] = []
        self.cached = 0
        """Tokens of the prompt that were read for another request."""
        self.text: Text | None = None
        """Its sequence; None while it waits."""
        self.cancelled = False
        self.paused = False
        """Whether its client has much to read yet, so that nothing is written meanwhile."""
        self.done = False

    @property
    def wanted(self) -> list[int]:
        """All tokens that its sequence is to have read."""
        return [*self.request.ids, *self.written]

    @property
    def pending(self) -> list[int]:
        """Those that it has not read yet."""
        assert self.text is not None
        return self.wanted[len(self.text.ids) :]

    def asked(self, context: int) -> Asked:
        """What may be guessed of it; its text has ``context`` tokens at most. The last one of an answer needs no guess."""
        ids = self.wanted
        left = min(self.request.max_tokens - len(self.written), context - len(ids))
        return Asked(self, ids, left - 1, self._sampler)

    def possible(self, draft: list[int]) -> list[int]:
        """As much of a guess as may follow, up to an end."""
        draft = next((draft[:place] for place, token in enumerate(draft) if token in self._ends), draft)
        return draft if self._grammar is None else draft[: self._grammar.fitting(draft)]

    def choose(self, logits: Any) -> None:
        """Choose the token after all that was read, by logits float32 ``(vocabulary,)``, and tell what it adds."""
        adjusted = self._adjusted(np.array(logits, np.float32))
        token = self._sampler.choose(adjusted)
        if self._grammar is not None:
            self._grammar.accept(token)
        if token in self._ends:
            self.finish(FinishReason.END)
            return
        self.written.append(token)
        self._counts[token] += 1
        if self.request.top_logprobs is not None:
            self._unsaid.append(probability(adjusted, token, self.request.top_logprobs))
        self._say(self._stops.push(self._detokenizer.push(token)))
        if self._stops.found is not None:
            self.finish(FinishReason.STOP)
        elif self._grammar is not None and self._grammar.finished:
            self.finish(FinishReason.END)
        elif len(self.written) >= self.request.max_tokens:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason) -> None:
        """Tell what was held back, and the end."""
        rest = self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        self._say(rest, last=True)
        self.done = True
        usage = Usage(len(self.request.ids), self.cached, len(self.written))
        self._tell(Finished(reason, usage, self._stops.found))

    def fail(self, error: Exception) -> None:
        """It cannot go on."""
        self.done = True
        self._tell(Failed(error))

    def _say(self, text: str, last: bool = False) -> None:
        if text or (last and self._unsaid):
            self._tell(Piece(text, tuple(self._unsaid)))
            self._unsaid.clear()

    def _adjusted(self, logits: Any) -> Any:
        request = self.request
        for token, bias in request.logit_bias:
            logits[token] += bias
        if self._counts and (request.frequency_penalty or request.presence_penalty):
            tokens = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits[tokens] -= request.frequency_penalty * counts + request.presence_penalty
        if self._grammar is not None:
            self._grammar.constrain(logits)
        return logits


def probability(logits: Any, token: int, count: int) -> TokenProbability:
    """The natural logarithms of the probabilities of ``token`` and of the ``count`` likeliest ones."""
    values = logits.astype(np.float64)
    highest = values.max()
    logprobs = values - (highest + np.log(np.exp(values - highest).sum()))
    likeliest = np.argsort(-logprobs, kind="stable")[:count]
    named = tuple((int(other), float(logprobs[other])) for other in likeliest)
    return TokenProbability(token, float(logprobs[token]), named)
