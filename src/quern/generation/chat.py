"""A conversation with a model: its chat template, one growing key/value cache, answers that stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import UserError
from quern.engines.base import AUTO
from quern.generation.detokenize import Detokenizer
from quern.generation.generate import Tell, continued, load_model, noted, pieces, warn
from quern.generation.sampling import Sampler, SamplingOptions
from quern.generation.speculation.opening import SpeculationOptions, open_speculation
from quern.generation.speculation.speculation import MOST_TOKENS
from quern.generation.stopping import end_tokens
from quern.loading.fitting import open_model
from quern.texts.tokens import check_vocabulary


class Chat:
    """One conversation; ``reply`` answers and remembers.

    Options are those of ``generate``. Raises ``UserError`` for a model whose tokenizer has no chat template.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 0.9,
        seed: int = 0,
        threads: int | None = None,
        engine: str = AUTO,
        cache: str | None = None,
        speculate: str = "none",
        draft: str | None = None,
        draft_tokens: int = MOST_TOKENS,
        tell: Tell = warn,
    ) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; give how many tokens an answer may have, 1 or more")
        self._sampler = Sampler(SamplingOptions(temperature, top_k, top_p), seed)
        speculation = SpeculationOptions(speculate, draft, draft_tokens)
        checkpoint = open_model(path)
        self._tokenizer = load_tokenizer(checkpoint.path)
        if not self._tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {path} has no chat template, so it is not a model for conversations; "
                "continue a text with `quern generate` instead"
            )
        self._max_tokens, self._end = max_tokens, end_tokens(checkpoint, self._tokenizer)
        self._tell, self._model = tell, load_model(checkpoint, engine, threads, cache, tell)
        load = partial(load_model, engine=AUTO, threads=threads, cache=None, tell=tell)
        self._speculation = open_speculation(speculation, self._model, self._tokenizer, load)
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._session, self._fed = self._model.start(), list[int]()

    def reply(self, text: str) -> Iterator[str]:
        """The answer to ``text``, piece by piece. Raises ``UserError`` when the conversation outgrows the context."""
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = self._encode(messages)
        check_vocabulary(ids, self._tokenizer, self._model.vocabulary_size)
        room = self._model.maximum_length - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids)} tokens and the model's context {self._model.maximum_length}; "
                "start a new one"
            )
        return self._answer(messages, ids, min(self._max_tokens, room))

    def _answer(self, messages: list[dict[str, str]], ids: list[int], count: int) -> Iterator[str]:
        # What was fed before is kept as far as it is the same: text may read back as other tokens than were spoken, and
        # some templates rewrite earlier turns.
        kept = 0
        while kept < min(len(ids) - 1, len(self._fed)) and ids[kept] == self._fed[kept]:
            kept += 1
        self._session.rewind(kept)
        spoken, said = list[int](), list[str]()
        decode = partial(self._tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        written = continued(self._session, ids, count, self._sampler, self._end, self._speculation)
        tokens = noted(written, self._model, self._tell)
        try:
            for piece in pieces(_remembered(tokens, spoken), Detokenizer(decode, ids)):
                said.append(piece)
                yield piece
        finally:
            self._fed = (ids + spoken)[: self._session.length]
            self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            found: Any = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program of its author's, and fails as it likes
            raise UserError(f"the model's chat template refuses this conversation: {error}") from None
        ids: list[int] = list(found["input_ids"])
        return ids


def _remembered(tokens: Iterator[int], kept: list[int]) -> Iterator[int]:
    for token in tokens:
        kept.append(token)
        yield token
