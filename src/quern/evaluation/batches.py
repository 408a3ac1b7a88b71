"""Sequences of unequal length through a model in batches of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from quern.core.engine import LoadedModel, SwitchingModel
from quern.core.errors import UserError

LOGITS_BYTES = 128 * 1024 * 1024
"""Most bytes of one batch's float32 logits, unless a single sequence needs more."""


def batched_logits(
    model: LoadedModel, sequences: Sequence[NDArray[np.int64]], logits_bytes: int = LOGITS_BYTES
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Pairs of a sequence's number and its logits ``(time, vocabulary)``, longest sequences first.

    Shorter sequences are padded on the right; a causal model's logits at the real tokens cannot see that, unless the length
    decides how a text is computed: then short and long ones do not meet in a batch. Raises ``UserError`` for a sequence
    longer than the model's context.
    """
    import torch  # here: declarations of measures are also read where nothing is computed

    longest = max(map(len, sequences), default=0)
    if longest > model.maximum_length:
        raise UserError(
            f"a sequence has {longest} tokens, the model's context {model.maximum_length}. Use a shorter window or text"
        )
    switch = model.switch_length if isinstance(model, SwitchingModel) else None
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]])
        size = max(1, logits_bytes // (4 * longest * model.vocabulary_size))
        members = order[start : start + size]
        if switch is not None and longest > switch:
            members = [number for number in members if len(sequences[number]) > switch]
        padded = torch.zeros(len(members), longest, dtype=torch.int64)
        for row, number in enumerate(members):
            padded[row, : len(sequences[number])] = torch.from_numpy(sequences[number])
        logits = model.logits(padded).detach().cpu().numpy()
        for row, number in enumerate(members):
            yield number, logits[row, : len(sequences[number])]
        start += len(members)
