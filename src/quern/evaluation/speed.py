"""Speed: one *round* is one timed prefill and one timed greedy decode of one sequence.

The caller interleaves the rounds of several contenders, so that a machine that slows down slows all of them, and leaves
the first, warming round out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quern.core.engine import LoadedModel
from quern.core.errors import UserError
from quern.core.seeds import generator
from quern.evaluation.energy import Meter


@dataclass(frozen=True)
class SpeedRound:
    """Seconds of one round."""

    prompt_tokens: int
    prefill_s: float
    """From the call with the prompt to the logits after its last token."""
    time_to_first_token_s: float
    """From before the session starts to the first generated token."""
    decode_tokens: int
    decode_s: float
    """All steps after the first generated token."""
    decode_joules: float | None
    """Energy of these steps; None where no counter is readable."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``SpeedRound(**data)`` reads it back."""
        return dataclasses.asdict(self)


def prompt_of(tokens: int, vocabulary_size: int, *, seed: int) -> list[int]:
    """Seeded token ids to time with; what they say does not change how long a dense model takes."""
    return [int(token) for token in generator(seed, "prompt").integers(vocabulary_size, size=tokens)]


def speed_round(
    model: LoadedModel,
    prompt: Sequence[int],
    decode_tokens: int,
    *,
    meter: Meter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedRound:
    """Time one prefill of ``prompt`` and ``decode_tokens`` greedy steps after the first token.

    Raises ``UserError`` where nothing would be timed or the model's context is too short for both.
    """
    if not prompt or decode_tokens < 1:
        raise UserError(f"a round needs a prompt and decode tokens; got {len(prompt)} and {decode_tokens}")
    if len(prompt) + decode_tokens > model.maximum_length:
        raise UserError(
            f"a prompt of {len(prompt)} and {decode_tokens} decoded tokens do not fit the model's context of "
            f"{model.maximum_length}. Ask for fewer tokens"
        )
    begin = clock()
    session = model.start()
    fed = clock()
    logits = session.feed(list(prompt))
    prefilled = clock()
    token = int(logits.argmax())
    first = clock()

    def decode() -> float:
        nonlocal token
        start = clock()
        for _ in range(decode_tokens):
            token = int(session.feed([token]).argmax())
        return clock() - start

    decode_s, joules = (decode(), None) if meter is None else meter.measure(decode)
    return SpeedRound(
        prompt_tokens=len(prompt),
        prefill_s=prefilled - fed,
        time_to_first_token_s=first - begin,
        decode_tokens=decode_tokens,
        decode_s=decode_s,
        decode_joules=joules,
    )
