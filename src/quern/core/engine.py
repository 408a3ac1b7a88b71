"""What evaluation and serving see of an engine: small protocols, whatever runs behind them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import collections.abc

    import torch


class Sequence(Protocol):
    """One text on a model, with its keys and values in the model's pool; ``BatchModel.step`` feeds it."""

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. What cannot be taken back to there is read again in the next step."""
        ...

    def fork(self, length: int) -> Sequence:
        """Another one that begins with the first ``length`` tokens, or with as many of them as both can have without
        reading them again: its ``length`` says."""
        ...

    def close(self) -> None:
        """Give its room in the pool back; it cannot be fed any more."""
        ...


class Session(Protocol):
    """One sequence that is fed alone."""

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        ...

    def feed(self, ids: list[int]) -> torch.Tensor:
        """Append tokens (a whole prompt or one token) and return the last position's logits, float32 ``(vocabulary,)``."""
        ...


@runtime_checkable
class SpeculativeSession(Session, Protocol):
    """A session that reads guesses of what follows, too."""

    def feed_drafted(self, ids: list[int], draft: list[int]) -> torch.Tensor:
        """Append ``ids`` and ``draft``: logits after ``ids`` and after each token of ``draft`` (see ``BatchModel.step``)."""
        ...


@runtime_checkable
class LimitedSession(Session, Protocol):
    """A session that may have room for fewer tokens than the model's context."""

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        ...

    @property
    def limit(self) -> str:
        """What limits them, as a clause."""
        ...


@runtime_checkable
class SwitchingModel(Protocol):
    """A model that may compute long texts in another way than short ones, from their first token on (``longrope``)."""

    switch_length: int | None
    """Tokens of the longest text that counts as short; None: all texts are alike."""


@runtime_checkable
class NotingModel(Protocol):
    """A model that may have done other than it was told, and says so."""

    notes: list[str]
    """What a person should know, each a clause."""


@runtime_checkable
class CachingModel(Protocol):
    """A model that knows what its key/value cache takes."""

    cache_bytes_per_token: int
    """Of the keys and values of one token, in all layers."""

    def limit_cache(self, most: int) -> None:
        """Plan with no more than ``most`` bytes for keys and values, once no sequence is open."""
        ...


class LoadedModel(Protocol):
    """Packed weights ready to run."""

    vocabulary_size: int
    maximum_length: int

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``(batch, time, vocabulary)`` for int64 ``(batch, time)``, without a cache."""
        ...

    def start(self) -> Session:
        """An empty session."""
        ...

    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token must read (an embedding row, not the whole embedding, unless tied)."""
        ...


class BatchModel(LoadedModel, Protocol):
    """A model that several sequences are fed to at once."""

    hidden_size: int

    def open(self) -> Sequence:
        """A sequence without tokens. Raises ``UserError`` where the pool has no room for any."""
        ...

    def step(
        self,
        batch: collections.abc.Sequence[tuple[Any, list[int]]],
        drafted: collections.abc.Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Append tokens to open sequences of this model, each of them given once, in any order and number.

        ``drafted[i]``: how many of the last tokens of sequence i are guesses, fewer than all; None: none. Returns float32
        logits ``(len(batch) + sum(drafted), vocabulary)``: of each sequence after the last token that is no guess, and after
        every guess; they are those that it would get alone. After guesses they are NaN where the sequence cannot hold one.
        Whoever finds a guess wrong rewinds. Raises ``UserError`` where a sequence does not fit, with what does; then none
        was changed.
        """
        ...

    def hidden_states(self, batch: collections.abc.Sequence[tuple[Any, list[int]]]) -> torch.Tensor:
        """Append tokens as ``step`` does; float32 ``(tokens, width)``: what the head reads after each of them."""
        ...


def cache_argument(model: Any) -> str:
    """What transformers calls the key/value cache, in the call of ``model`` and in what it returns.

    It was ``past_key_values`` until 5.23 and is ``cache`` since 5.24, which warns of the older name.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def switch_length(config: Any) -> int | None:
    """``SwitchingModel.switch_length`` of a model with transformers' configuration ``config``.

    ``longrope`` (Ding et al. 2024, arXiv 2402.13753) has one set of rotary frequencies for texts of up to
    ``original_max_position_embeddings`` tokens, and another for longer ones, all of their positions.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters["original_max_position_embeddings"])
