"""Speculation as a person asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.engine import BatchModel, LoadedModel, SwitchingModel
from quern.core.errors import UserError, option
from quern.core.text.suggest import did_you_mean
from quern.generation.speculation.draft_model import DraftModel
from quern.generation.speculation.drafter import Drafter
from quern.generation.speculation.ngram import NgramDrafter
from quern.generation.speculation.speculation import MOST_TOKENS, Speculation
from quern.loading.fitting import open_model

KINDS = ("none", "ngram")
MOST = 15
"""Guesses for one text in one pass that can be asked for."""


@dataclass(frozen=True)
class SpeculationOptions:
    """Who guesses what follows. Raises ``UserError`` for what does not go together."""

    kind: str = "none"
    """``ngram``: the text itself."""
    draft: str | None = None
    """A small model, by its path."""
    tokens: int = MOST_TOKENS
    """Guesses for one text in one pass, at most."""

    def __post_init__(self) -> None:
        given = option(f"speculate={self.kind!r}", f"--speculate {self.kind}")
        if self.kind not in KINDS:
            raise UserError(f"{given} is not known; give one of {', '.join(KINDS)}{did_you_mean(self.kind, KINDS)}")
        if self.kind != "none" and self.draft is not None:
            raise UserError(f"{given} and {option('draft', '--draft')} both guess what follows; give one of them")
        if not 1 <= self.tokens <= MOST:
            raise UserError(f"{option('draft_tokens', '--draft-tokens')} is {self.tokens}; give 1 to {MOST}")


def open_speculation(
    options: SpeculationOptions, model: LoadedModel, tokenizer: Any, load: Callable[[Checkpoint], LoadedModel]
) -> Speculation | None:
    """What ``options`` ask for, for ``model`` with ``tokenizer``; ``load`` opens the draft model.

    Raises ``UserError`` for a draft model that has another tokenizer.
    """
    if options.draft is None and options.kind == "none":
        return None
    drafter: Drafter = NgramDrafter()
    if options.draft is not None:
        checkpoint = open_model(options.draft)
        check_tokenizer(options.draft, load_tokenizer(checkpoint.path), tokenizer)
        drafter = DraftModel(cast(BatchModel, load(checkpoint)), model.vocabulary_size)
    switch_length = model.switch_length if isinstance(model, SwitchingModel) else None
    return Speculation(drafter, options.tokens, switch_length)


def check_tokenizer(draft: str, theirs: Any, ours: Any) -> None:
    """Raise ``UserError`` where a draft model does not know a token of the model, or by another number."""
    known, wanted = theirs.get_vocab(), ours.get_vocab()
    differing = [(number, token) for token, number in wanted.items() if known.get(token) != number]
    if not differing:
        return
    number, token = min(differing)
    there = f"token {known[token]} there" if token in known else "no token there"
    raise UserError(
        f"the draft model {draft} has another tokenizer: token {number} of the model, {token!r}, is {there}. Give a smaller "
        f"model of the same family, or leave out {option('draft', '--draft')}"
    )
