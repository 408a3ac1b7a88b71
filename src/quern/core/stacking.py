"""What can be stacked: parts of a recipe and of its use, what each declares of itself, answers about two of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from quern.core.text.language import gettext, translatable

PartKind = Literal["transform", "rounding", "codec", "activations", "storage", "cache", "format", "runtime"]
Property = Literal["even columns"]
"""What a component may rely on, of the weights that come to it: columns of a row that are about alike in size."""
Label = Literal["works", "degrades", "refuses"]
"""``works``: no worse than what was there before, within noise. ``degrades``: runs and loses. ``refuses``: stops before any
work starts."""


class Part(NamedTuple):
    """Something that a stack is made of."""

    kind: PartKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Traits:
    """What a component declares, from which it follows what others do to it."""

    wants: Mapping[Property, str] = field(default_factory=dict)
    """What it relies on, and why, as a clause: what is lost where that is not so."""
    removes: Mapping[Property, str] = field(default_factory=dict)
    """What is not so any more behind it, and why, as a clause."""
    restores: frozenset[Property] = frozenset()
    """What is so again behind it, whatever was before."""
    acts: str = ""
    """When it acts and on which numbers, as a clause about itself."""


NO_TRAITS = Traits()
_SHOWN = (translatable("even columns"), translatable("works"), translatable("degrades"), translatable("refuses"))
"""Properties and labels as they are read."""


@dataclass(frozen=True)
class Answer:
    """What becomes of parts that are used together."""

    label: Label
    reason: str
    """A sentence without its full stop."""


def conflict(first: Part, first_traits: Traits, second: Part, second_traits: Traits) -> tuple[Property, str] | None:
    """What one of two parts loses by the other, and why, by what both declare; None if neither does."""
    for wanting, wants, other, removes in (
        (first, first_traits.wants, second, second_traits.removes),
        (second, second_traits.wants, first, first_traits.removes),
    ):
        for what in sorted(set(wants) & set(removes)):
            return what, gettext(
                "{wanting} relies on {what}, because {why}; {other} {removes}",
                wanting=wanting.name,
                what=gettext(what),
                why=gettext(wants[what]),
                other=other.name,
                removes=gettext(removes[what]),
            )
    return None


def losing(parts: Mapping[Part, Traits]) -> Iterator[tuple[Part, Part, str]]:
    """Every two of ``parts``, used together, of which one loses by the other and no third part mends it; and why."""
    mended = {what for traits in parts.values() for what in traits.restores}
    for (first, one), (second, other) in itertools.combinations(parts.items(), 2):
        found = conflict(first, one, second, other)
        if found is not None and found[0] not in mended:
            yield first, second, found[1]
