"""The block types of ggml by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from quern.codecs.blocks.plain import AffineBlocks, LevelBlocks, SymmetricBlocks
from quern.codecs.blocks.super import TYPES as SUPER
from quern.codecs.blocks.super import SuperBlocks
from quern.codecs.grouped import GroupedCodec

TypeName = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"]
TYPES: dict[str, Callable[[], GroupedCodec]] = {
    "q4_0": lambda: SymmetricBlocks(4),
    "q4_1": lambda: AffineBlocks(4),
    "q5_0": lambda: SymmetricBlocks(5),
    "q5_1": lambda: AffineBlocks(5),
    "q8_0": lambda: SymmetricBlocks(8),
    "iq4_nl": LevelBlocks,
    "q2_k": lambda: SuperBlocks(SUPER["Q2_K"]),
    "q3_k": lambda: SuperBlocks(SUPER["Q3_K"]),
    "q4_k": lambda: SuperBlocks(SUPER["Q4_K"]),
    "q5_k": lambda: SuperBlocks(SUPER["Q5_K"]),
    "q6_k": lambda: SuperBlocks(SUPER["Q6_K"]),
    "iq4_xs": lambda: SuperBlocks(SUPER["IQ4_XS"]),
}
INSTEAD = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""The type with blocks of 32 that takes rows which are no whole super-blocks; as llama.cpp chooses it."""
