"""llama.cpp's mixes around 4-bit types that are no K-quants: tables of levels, and blocks of 32 weights with one scale."""

from __future__ import annotations

from quern.core.recipe import MIXES
from quern.formats.mixes.base import WIDE_KEYS, WIDE_OUTPUT, Mix, Rule, first_of

MIXES.add("iq4_nl")(Mix("iq4_nl", (Rule("value", "q5_k", sharing=4), *WIDE_KEYS, WIDE_OUTPUT)))
MIXES.add("iq4_xs")(Mix("iq4_xs", (Rule("value", "q5_k", sharing=4), *WIDE_KEYS, WIDE_OUTPUT)))
MIXES.add("q4_0")(Mix("q4_0", (Rule("down", "q4_1", first_of(8)), *WIDE_KEYS)))
MIXES.add("q4_1")(Mix("q4_1", WIDE_KEYS))
MIXES.add("q5_0")(Mix("q5_0", (Rule("down", "q5_1", first_of(8)), *WIDE_KEYS)))
MIXES.add("q5_1")(Mix("q5_1", WIDE_KEYS))
MIXES.add("q8_0")(Mix("q8_0", WIDE_KEYS, head="q8_0"))
