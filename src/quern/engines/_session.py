"""What the engines share about sequences: a session is a sequence that is fed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from quern.core.engine import BatchModel
from quern.core.errors import UserError


class SequenceSession:
    """One sequence of a model that steps in batches; see ``core.engine.Session``."""

    def __init__(self, model: BatchModel) -> None:
        self._model = model
        self.sequence: Any = model.open()

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return int(self.sequence.length)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.sequence.rewind(length)

    def feed(self, ids: list[int]) -> Tensor:
        """Append ``ids``; float32 logits ``(vocabulary,)`` of the last position. Raises ``UserError`` past the maximum."""
        return self._model.step([(self.sequence, ids)])[0]

    def feed_drafted(self, ids: list[int], draft: list[int]) -> Tensor:
        """Append ``ids`` and guesses; logits ``(1 + len(draft), vocabulary)``, see ``core.engine.BatchModel.step``."""
        return self._model.step([(self.sequence, [*ids, *draft])], [len(draft)])


def check_batch(batch: Sequence[tuple[Any, list[int]]], drafted: Sequence[int] | None = None) -> list[int]:
    """How many tokens of each sequence of a step are guesses.

    Raises ``UserError`` for a step without sequences, with one twice, or with one that gets no token but guesses.
    """
    if not batch:
        raise UserError("a step has no sequences; give at least one, with its tokens")
    if len({id(sequence) for sequence, _ in batch}) < len(batch):
        raise UserError("a step has a sequence twice; give all of its tokens at once")
    for index, (_, tokens) in enumerate(batch):
        if not tokens:
            raise UserError(f"sequence {index} of a step gets no tokens; give at least one, or leave the sequence out")
    counts = [0] * len(batch) if drafted is None else list(drafted)
    if len(counts) != len(batch):
        raise UserError(f"a step has {len(batch)} sequences, and guesses of {len(counts)}; give one number for each")
    for index, ((_, tokens), count) in enumerate(zip(batch, counts, strict=True)):
        if not 0 <= count < len(tokens):
            raise UserError(
                f"sequence {index} of a step gets {len(tokens)} tokens, which cannot have {count} guesses at the end"
            )
    return counts
