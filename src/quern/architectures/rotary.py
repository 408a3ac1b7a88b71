"""Rotary frequencies that depend on how long the text is.

``longrope`` (Ding et al. 2024, arXiv 2402.13753) has two sets of frequencies: texts of up to
``original_max_position_embeddings`` tokens go by the short one, longer ones by the long one, all of their positions. So the
token that makes a text long changes every key that was computed before.

``dynamic`` (NTK-aware scaling by length) changes its frequencies only beyond ``max_position_embeddings``, which is the
model's context: within it they are constant.
"""

from __future__ import annotations

from typing import Any

from quern.architectures.gated_decoder import GatedDecoder
from quern.core.engine import switch_length


def frequencies(architecture: GatedDecoder) -> tuple[list[list[float]], float]:
    """Sets of ``head_dim / 2`` frequencies, for short texts and, where there is a switch, long ones; factor of both.

    Taken from transformers' own class at the greatest length of each kind.
    """
    import torch

    sets = []
    rotary: Any = architecture.build_rotary()
    context = architecture.config.max_position_embeddings
    switch = switch_length(architecture.config)
    for length in [context] if switch is None or switch >= context else [switch, context]:
        rotary(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
        sets.append([float(value) for value in rotary.inv_freq])
    return sets, float(rotary.attention_scaling)
