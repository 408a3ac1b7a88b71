"""Accuracy of a loaded model on windows of text: divergence from reference logits, likelihood, top-1 agreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quern.core import metrics
from quern.core.engine import LoadedModel
from quern.core.errors import UserError
from quern.evaluation.batches import batched_logits
from quern.evaluation.texts import Window

Advance = Callable[[int], None]


class Reference(Protocol):
    """Where the unquantized model's logits come from."""

    def __len__(self) -> int:
        """Number of windows."""
        ...

    def window(self, number: int) -> NDArray[np.float32]:
        """Logits ``(scored tokens, vocabulary)`` of one window."""
        ...


@dataclass(frozen=True)
class DocumentScore:
    """Sums over one document's scored tokens."""

    document: int
    tokens: int
    nats: float
    """Negative log-likelihood of the text."""
    divergence: float | None
    """KL divergence from the reference in nats; None without a reference."""
    agreeing: int | None
    """Tokens for which the reference puts the same prediction first."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``DocumentScore(**data)`` reads it back."""
        return dataclasses.asdict(self)


def keep_nothing(count: int) -> None:
    """An ``Advance`` that does nothing."""


def score_windows(
    model: LoadedModel, windows: Sequence[Window], reference: Reference | None = None, advance: Advance = keep_nothing
) -> list[DocumentScore]:
    """Scores of each document, in the order of documents; ``advance`` gets the number of tokens of each finished window.

    Position t of a window is scored on token t + 1; its last position has no target and is left out everywhere. Raises
    ``NonFiniteError`` for logits with NaN or infinity and ``UserError`` for a reference of another text.
    """
    if not windows:
        raise UserError("there is no text to score")
    if reference is not None and len(reference) != len(windows):
        raise UserError(f"the reference logits are of {len(reference)} windows of text, not of these {len(windows)}")
    scores: dict[int, DocumentScore] = {}
    for number, logits in batched_logits(model, [window.ids for window in windows]):
        window = windows[number]
        score = _score(window, logits[:-1], None if reference is None else reference.window(number))
        scores[number] = score
        advance(len(window.ids))
    return _by_document([scores[number] for number in range(len(windows))])


def _score(window: Window, logits: NDArray[np.float32], reference: NDArray[np.float32] | None) -> DocumentScore:
    nats = float(metrics.nats_per_token(logits, window.ids[1:]).sum())
    if reference is None:
        return DocumentScore(window.document, len(logits), nats, None, None)
    divergence = float(metrics.divergence_per_token(reference, logits).sum())
    agreeing = int(metrics.same_top1(reference, logits).sum())
    return DocumentScore(window.document, len(logits), nats, divergence, agreeing)


def _by_document(scores: Sequence[DocumentScore]) -> list[DocumentScore]:
    """Sums of the windows of each document, added in the order of the text so that batches change nothing."""
    result: dict[int, DocumentScore] = {}
    for score in scores:
        if score.document in result:
            score = _sum(result[score.document], score)
        result[score.document] = score
    return list(result.values())


def _sum(a: DocumentScore, b: DocumentScore) -> DocumentScore:
    divergence = None if a.divergence is None or b.divergence is None else a.divergence + b.divergence
    agreeing = None if a.agreeing is None or b.agreeing is None else a.agreeing + b.agreeing
    return DocumentScore(a.document, a.tokens + b.tokens, a.nats + b.nats, divergence, agreeing)


def read_scores(raw: Sequence[Mapping[str, Any]]) -> list[DocumentScore]:
    """Scores that ``DocumentScore.to_json`` made plain data."""
    return [DocumentScore(**score) for score in raw]


def text_perplexity(scores: Sequence[DocumentScore]) -> float:
    """exp of the mean negative log-likelihood over all tokens. Raises ``MetricError`` for no scores."""
    return metrics.perplexity(sum(score.nats for score in scores), sum(score.tokens for score in scores))


def mean_divergence(scores: Sequence[DocumentScore], *, seed: int) -> metrics.Estimate | None:
    """Mean KL in nats a token, with its interval over documents; None without a reference."""
    divergences = [score.divergence for score in scores if score.divergence is not None]
    if not scores or len(divergences) < len(scores):
        return None
    return metrics.weighted_mean(divergences, [score.tokens for score in scores], seed=seed)


def agreement(scores: Sequence[DocumentScore]) -> float | None:
    """Share of all tokens for which the reference puts the same prediction first; None without a reference."""
    agreeing = [score.agreeing for score in scores if score.agreeing is not None]
    if not scores or len(agreeing) < len(scores):
        return None
    return sum(agreeing) / sum(score.tokens for score in scores)


def reference_logits(
    model: LoadedModel,
    windows: Sequence[Window],
    keep: Callable[[int, NDArray[np.float32]], None],
    advance: Advance = keep_nothing,
) -> None:
    """Compute the logits that others are compared with; ``keep`` gets a window's number and ``(scored, vocabulary)``.

    Raises ``NonFiniteError`` where the reference itself overflows.
    """
    for number, logits in batched_logits(model, [window.ids for window in windows]):
        if not np.isfinite(logits).all():
            raise metrics.NonFiniteError(f"the reference's own logits hold NaN or infinity (window {number})")
        keep(number, logits[:-1])
        advance(len(windows[number].ids))
