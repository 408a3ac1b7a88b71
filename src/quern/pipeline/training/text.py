"""Text to train on, the part of it that is held out, and what a recipe calibrates on of it before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.core.errors import UserError, option
from quern.core.recipe import Recipe
from quern.core.recipe_parts import Calibration
from quern.pipeline.blockwise import tuning
from quern.pipeline.blockwise.calibration_text import CalibrationText
from quern.pipeline.request import calibration_sequences
from quern.texts.source import Text

HELD_OUT = 8
"""One of so many sequences is held out, the last ones."""
SEQUENCE = 512
"""Tokens of a sequence, unless the model's context or the text is shorter."""


class TrainingText(CalibrationText):
    """The user's texts, or what calibration takes where there are none."""

    def __init__(self, texts: Sequence[str | Path | Text], tokenizer: Any, tokens: int) -> None:
        length = max(1, min(SEQUENCE, tokens // 2))
        super().__init__(texts, tokenizer, Calibration(tokens=tokens, sequence_length=length))
        self._tokens = tokens

    def _too_short(self, count: int, time: int, wanted: int) -> UserError:
        return UserError(
            f"the training text has {count} tokens, and {wanted * time} are wanted, of which one in {HELD_OUT} is held out "
            f"and not trained on. Give more text with {option('texts', '--text')}, or a smaller "
            f"{option('tokens', '--tokens')} (at most {count // time * time if count >= 2 * time else count})"
        )

    def drawn(self, architecture: Architecture, seed: int) -> tuple[Tensor, int]:
        """Sequences int64 ``(sequences, time)`` and how many of them, the last ones, are held out.

        Raises ``UserError`` where the text is too short, or gives less than two.
        """
        sequences = calibration_sequences(architecture, self, seed)
        assert sequences is not None
        if len(sequences) < 2:
            raise UserError(
                f"{self._tokens} tokens are one sequence, and one more has to be held out to see whether training helps. "
                f"Give {option('tokens', '--tokens')} of at least {2 * sequences.shape[1]}, and text to match"
            )
        return sequences, max(1, len(sequences) // HELD_OUT)


class _StartText(CalibrationText):
    """What the recipe that training begins with calibrates on."""

    def _too_short(self, count: int, time: int, wanted: int) -> UserError:
        asked = wanted * time
        return UserError(
            f"the recipe calibrates on {wanted} sequences of {time} = {asked} tokens of the text that is trained on, which "
            f"has {count}. Give more text with {option('texts', '--text')}, a recipe that calibrates on fewer, or an "
            f"artifact that was calibrated on other text with {option('artifact', '--from')}"
        )


def check_calibration(
    texts: Sequence[str | Path | Text], recipe: Recipe, original: Checkpoint, architecture: Architecture, seed: int
) -> None:
    """Raise ``UserError`` where the texts that are trained on are too short for the recipe that training begins with."""
    if recipe.needs_calibration:
        text = _StartText(texts, usable_tokenizer(original.path, True), recipe.calibration)
        tuning.checked(calibration_sequences(architecture, text, seed), recipe)
