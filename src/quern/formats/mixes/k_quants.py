"""llama.cpp's mixes of super-blocks with 2 to 6 bits."""

from __future__ import annotations

from quern.core.recipe import MIXES
from quern.formats.mixes.base import WIDE_KEYS, WIDE_OUTPUT, Mix, Rule, eight, first, first_of, more_bits

MIXES.add("q2_k")(
    Mix(
        "q2_k",
        (
            Rule("value", "q3_k"),
            Rule("value", "q4_k", sharing=4),
            Rule("down", "q3_k"),
            Rule("output", "q3_k"),
            *WIDE_KEYS,
            WIDE_OUTPUT,
        ),
    )
)
MIXES.add("q2_k_s")(Mix("q2_k", (Rule("value", "q4_k", sharing=4), Rule("down", "q4_k", first_of(8)), *WIDE_KEYS)))
MIXES.add("q3_k_s")(Mix("q3_k", (*WIDE_KEYS, WIDE_OUTPUT)))
MIXES.add("q3_k_m")(
    Mix(
        "q3_k",
        (
            Rule("value", "q4_k"),
            Rule("value", "q5_k", first(2)),
            Rule("down", "q4_k"),
            Rule("down", "q5_k", first_of(16)),
            Rule("output", "q4_k"),
            *WIDE_KEYS,
            WIDE_OUTPUT,
        ),
    )
)
MIXES.add("q3_k_l")(
    Mix(
        "q3_k",
        (
            Rule("value", "q5_k"),
            Rule("down", "q5_k"),
            Rule("output", "q5_k"),
            *WIDE_KEYS,
            Rule("output", "q3_k", experts=eight),
        ),
    )
)
MIXES.add("q4_k_s")(
    Mix("q4_k", (Rule("value", "q5_k", first(4)), Rule("down", "q5_k", first_of(8)), *WIDE_KEYS, WIDE_OUTPUT))
)
MIXES.add("q4_k_m")(
    Mix("q4_k", (Rule("value", "q6_k", more_bits), Rule("down", "q6_k", more_bits), *WIDE_KEYS, WIDE_OUTPUT))
)
MIXES.add("q5_k_s")(Mix("q5_k", WIDE_KEYS))
MIXES.add("q5_k_m")(Mix("q5_k", (Rule("value", "q6_k", more_bits), Rule("down", "q6_k", more_bits), *WIDE_KEYS)))
MIXES.add("q6_k")(Mix("q6_k", WIDE_KEYS))
