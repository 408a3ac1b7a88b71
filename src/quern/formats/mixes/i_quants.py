"""llama.cpp's mixes of points of grids with 2 to 3.5 bits."""

from __future__ import annotations

from quern.core.recipe import MIXES
from quern.formats.mixes.base import (
    WIDE_KEYS,
    WIDE_OUTPUT,
    Mix,
    Rule,
    eight,
    first_of,
    four_or_more,
    middle,
    more_bits,
)

EXPERTS = (Rule("value", "q4_k", experts=four_or_more), Rule("key", "q4_k", experts=eight), WIDE_OUTPUT)
"""Of mixes of two bits."""

for name in ("iq2_xxs", "iq2_xs"):
    rules: tuple[Rule, ...]
    rules = (Rule("value", "q2_k"), Rule("value", "q4_k", sharing=4), Rule("down", "q2_k", first_of(8)), *EXPERTS)
    MIXES.add(name)(Mix(name, rules, head="q5_k", embedding="q2_k", widens=False))
for name, usual in (("iq2_s", "iq2_xs"), ("iq2_m", "iq2_s")):
    rules = (
        Rule("value", "iq3_s"),
        Rule("value", "q4_k", sharing=4),
        Rule("down", "iq3_s", first_of(8)),
        Rule("output", "iq3_s"),
        *EXPERTS,
    )
    MIXES.add(name)(Mix(usual, rules, head="q5_k", embedding="iq3_s", widens=False))
MIXES.add("iq3_xxs")(
    Mix(
        "iq3_xxs",
        (
            Rule("value", "q4_k", sharing=4),
            Rule("key", "iq2_s"),
            Rule("query", "iq2_s"),
            Rule("output", "iq3_s"),
            *WIDE_KEYS,
            WIDE_OUTPUT,
        ),
        head="q5_k",
        embedding="iq3_s",
    )
)
MIXES.add("iq3_xs")(
    Mix(
        "iq3_s",
        (
            Rule("value", "q4_k", sharing=4),
            Rule("key", "iq3_xxs"),
            Rule("query", "iq3_xxs"),
            Rule("gate", "iq3_xxs", middle),
            Rule("up", "iq3_xxs", middle),
            *WIDE_KEYS,
            WIDE_OUTPUT,
        ),
    )
)
MIXES.add("iq3_s")(Mix("iq3_s", (Rule("value", "q4_k", sharing=4), *WIDE_KEYS, WIDE_OUTPUT)))
MIXES.add("iq3_m")(
    Mix(
        "iq3_s",
        (
            Rule("value", "q4_k"),
            Rule("down", "q4_k", first_of(8)),
            Rule("output", "q4_k"),
            Rule("down", "q4_k", more_bits, experts=eight),
            *WIDE_KEYS,
            WIDE_OUTPUT,
        ),
    )
)
