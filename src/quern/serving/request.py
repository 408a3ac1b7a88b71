"""What is asked of a model, and what it answers, whatever protocol carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from quern.generation.sampling import SamplingOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Grammar(Protocol):
    """What tokens may follow; see ``serving.grammar``."""

    def constrain(self, logits: NDArray[Any]) -> None:
        """Set the logits of tokens that may not follow to minus infinity, in place."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen. Raises ``QuernError`` for one that may not follow."""
        ...

    def fitting(self, tokens: list[int]) -> int:
        """How many of ``tokens`` may follow, one after the other; nothing is chosen by asking."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing may follow any more."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """One text to be continued."""

    ids: tuple[int, ...]
    """The prompt; at least one token."""
    max_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    ignore_end: bool = False
    """Whether tokens that end texts are tokens like others."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of tokens."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was written; ``presence_penalty``: once, if it was at all."""
    presence_penalty: float = 0.0
    top_logprobs: int | None = None
    """How many of the likeliest tokens are named beside each; None: no probabilities."""
    grammar: Callable[[], Grammar] | None = None
    """Makes what constrains the answer."""


class FinishReason(Enum):
    """Why an answer ended."""

    END = "end"
    """The model ended it, or a grammar did."""
    STOP = "stop"
    """A stop text."""
    LENGTH = "length"
    """``max_tokens``, or no room is left."""
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class TokenProbability:
    """A token that was written and what else might have been."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some text of the answer; the pieces join to it."""

    text: str
    tokens: tuple[TokenProbability, ...] = ()
    """Of what was written since the last piece; empty unless asked for."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt: int
    cached: int
    """Of the prompt, those whose keys and values another request left."""
    written: int


@dataclass(frozen=True)
class Finished:
    """The end of an answer, after its last piece."""

    reason: FinishReason
    usage: Usage
    stop: str | None = None
    """The text that stopped it."""


@dataclass(frozen=True)
class Failed:
    """The answer cannot go on."""

    error: Exception


Event = Piece | Finished | Failed
