"""The block types of ggml by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from quern.codecs.base import Codec
from quern.codecs.blocks.plain import AffineBlocks, LevelBlocks, SymmetricBlocks
from quern.codecs.blocks.points import TYPES as POINTS
from quern.codecs.blocks.super import TYPES as SUPER
from quern.codecs.blocks.super import SuperBlocks
from quern.codecs.blocks.vectors import PointBlocks

TypeName = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs",
    "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s",
]  # fmt: skip
TYPES: dict[str, Callable[[], Codec]] = {
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
    "iq2_xxs": lambda: PointBlocks(POINTS["IQ2_XXS"]),
    "iq2_xs": lambda: PointBlocks(POINTS["IQ2_XS"]),
    "iq2_s": lambda: PointBlocks(POINTS["IQ2_S"]),
    "iq3_xxs": lambda: PointBlocks(POINTS["IQ3_XXS"]),
    "iq3_s": lambda: PointBlocks(POINTS["IQ3_S"]),
}
INSTEAD = {
    **dict.fromkeys(("q2_k", "q3_k", "iq4_xs", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), "iq4_nl"),
    "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
}  # fmt: skip
"""The type with blocks of 32 that takes rows which are no whole super-blocks: of as many bytes as llama.cpp's choice."""
