"""Answers of a given form: JSON by a schema, or a regular expression, by llguidance (extra ``quern[serve]``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from quern.core.errors import QuernError, UserError

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is laid out: small models that may put any white space anywhere do not come to an end of it."""
LONGEST = 1 << 18
"""Characters of a schema or expression, at most."""


class Grammars:
    """Makes grammars for the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        """``vocabulary``: logits of the model, which may be more than the tokenizer's tokens; ``ends``: tokens that end."""
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._prepared: Any = None

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Callable[[], TokenGrammar]:
        """JSON that a schema describes. Raises ``UserError`` for a schema that cannot be followed."""
        from llguidance import LLMatcher

        text = json.dumps(schema)
        _check_length(text, "the schema")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=COMPACT)
        except ValueError as error:
            raise UserError(f"the schema cannot be followed: {error}") from None
        return self._made(grammar, "the schema")

    def regex(self, expression: str) -> Callable[[], TokenGrammar]:
        """Text that a regular expression matches as a whole. Raises ``UserError`` for one that cannot be followed."""
        from llguidance import LLMatcher

        _check_length(expression, "the regular expression")
        return self._made(LLMatcher.grammar_from_regex(expression), "the regular expression")

    def lark(self, grammar: str, what: str = "the grammar") -> Callable[[], TokenGrammar]:
        """Text of a context-free grammar in Lark's notation. Raises ``UserError``."""
        from llguidance import LLMatcher

        _check_length(grammar, what)
        return self._made(LLMatcher.grammar_from_lark(grammar), what)

    def _made(self, grammar: str, what: str) -> Callable[[], TokenGrammar]:
        from llguidance import LLMatcher

        tokens = self._tokens()
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokens)
        if failed:
            raise UserError(f"{what} cannot be followed: {messages[0].splitlines()[0][:500]}")
        return lambda: TokenGrammar(LLMatcher(tokens, grammar, log_level=0), self._vocabulary)

    def _tokens(self) -> Any:
        if self._prepared is None:
            from llguidance.hf import from_tokenizer

            self._prepared = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends or None)
        return self._prepared


class TokenGrammar:
    """One answer's place in a grammar; see ``serving.request.Grammar``."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((1, -(-vocabulary // 32)), np.int32)

    def constrain(self, logits: Any) -> None:
        """Tokens that may not follow get minus infinity, in place."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        if not allowed.any():
            raise QuernError(f"nothing can follow in the grammar: {self._matcher.get_error() or 'it has ended'}")
        logits[~allowed] = -np.inf

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        if not self._matcher.consume_token(token):
            raise QuernError(f"the grammar went wrong: {self._matcher.get_error()[:500]}")

    def fitting(self, tokens: list[int]) -> int:
        """How many of ``tokens`` may follow, one after the other."""
        return int(self._matcher.validate_tokens(tokens))

    @property
    def finished(self) -> bool:
        """Whether nothing may follow any more but the end."""
        return bool(self._matcher.is_stopped())


def _check_length(text: str, what: str) -> None:
    if len(text) > LONGEST:
        raise UserError(f"{what} has {len(text)} characters; at most {LONGEST} are taken")
