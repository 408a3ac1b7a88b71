"""What becomes of parts that are used together: first what stops before work starts, then what loses.

Nothing here knows a part by name. What stops is asked of those who stop it when a model is quantized or run: the recipe's
rules, the format's writer, the engine, the runtimes that a format is for. What loses follows from what components declare.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from quern.architectures.base import Architecture, architecture_of
from quern.core.errors import UserError
from quern.core.recipe import Recipe, parse_recipe
from quern.core.stacking import Answer, Part, losing
from quern.core.text.language import gettext, spoken, translatable
from quern.engines.base import ENGINES
from quern.formats.base import FORMATS, ArtifactWriter, obstacles_of, runtimes_of
from quern.pipeline.blockwise.job import plan_of
from quern.pipeline.request import checked_writer
from quern.pipeline.stacking.parts import NEUTRAL, PLAIN, REMEDIES, Keys, all_parts, merged, traits_of, variants

SOURCE = "recipe"
ORDINARY_DECODER = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
"""The model that is thought of where none is given: linears without biases, sides that are multiples of 128."""


@cache
def ordinary_architecture() -> Architecture:
    """That of ``ORDINARY_DECODER``."""
    return architecture_of(ORDINARY_DECODER)


@dataclass(frozen=True)
class Together:
    """Two parts used together."""

    first: Part
    second: Part
    answer: Answer
    keys: tuple[Keys, Keys, Keys] = ({}, {}, {})
    """What a recipe says beside ``PLAIN`` to use the first, the second (both in quern's own format) and both together; where
    they are refused, as it was tried."""


def pairs() -> Iterator[tuple[Part, Part]]:
    """Every ordered pair of parts."""
    return itertools.permutations(all_parts(), 2)


def together(first: Part, second: Part) -> Together:
    """What becomes of the two in an ordinary decoder."""
    return _together(first, second, spoken())


@cache
def _together(first: Part, second: Part, language: str) -> Together:
    if first.kind == second.kind and first.kind in _ONE:
        return Together(first, second, Answer("refuses", gettext(_ONE[first.kind])))
    cache_name = next((part.name for part in (first, second) if part.kind == "cache"), None)
    runtimes = [part.name for part in (first, second) if part.kind == "runtime"]
    refused: list[Together] = []
    for format, (ours, theirs) in itertools.product(_formats(first, second), _keys(first, second)):
        keys = (_anywhere(ours), _anywhere(theirs), {"format": format} | merged(ours, theirs))
        found = _tried(PLAIN | keys[2])
        stops = found if isinstance(found, str) else use_obstacle(found, cache_name, runtimes)
        if stops is None:
            assert isinstance(found, Recipe)
            return Together(first, second, _accepted(first, second, keys[2], found), keys)
        refused.append(Together(first, second, Answer("refuses", stops), keys))
    return [one for one in refused if one.keys[2]["format"] == refused[0].keys[2]["format"]][-1]


_ONE = {
    "cache": translatable("keys and values of one run are kept in one precision"),
    "format": translatable("an artifact is written in one format; quantize once for each"),
}
"""Kinds of which a stack has one part, and why."""


def _keys(first: Part, second: Part) -> Iterator[tuple[Keys, Keys]]:
    """What a recipe may say to use each of the two, so that both can be there."""
    for ours, theirs in itertools.product(variants(first), variants(second)):
        if first.kind == second.kind or "weights" not in ours or "weights" not in theirs:
            yield ours, theirs


def _anywhere(keys: Keys) -> Keys:
    return {key: value for key, value in keys.items() if key != "format"}


def _formats(first: Part, second: Part) -> list[str]:
    """The formats that may hold the stack, the likeliest first: the one that is part of it; those that its runtimes read."""
    named = [part.name for part in (first, second) if part.kind == "format"]
    runtimes = [part.name for part in (first, second) if part.kind == "runtime"]

    def unread(name: str) -> int:
        return sum(runtime not in (*FORMATS.get(name).runtimes, "cpu") for runtime in runtimes)

    def rank(name: str) -> tuple[int, bool, bool, str]:
        return unread(name), FORMATS.get(name).opened_as_values, name != "quern", name

    return named or sorted(FORMATS.names(), key=rank)


def _tried(keys: Keys) -> Recipe | str:
    """The recipe, or why it is refused before any work is done."""
    try:
        recipe = parse_recipe(keys, SOURCE)
        writer_for(recipe, ordinary_architecture())
    except UserError as error:
        return plain_reason(error)
    return recipe


_EXAMPLES = re.compile(r" \((got |model\.).*\)$")
"""Where a message says which value came, or which matrices it means."""
_SUBJECT = re.compile(r"(format [\w-]+) cannot store ")


def writer_for(recipe: Recipe, architecture: Architecture) -> ArtifactWriter:
    """The writer. Raises ``UserError`` where quantizing would: for unknown names and for what the format cannot store."""
    return checked_writer(recipe, plan_of(recipe, architecture), architecture)


def plain_reason(error: UserError) -> str:
    """The part of a message that says why, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines[1:] if not line.startswith("Change the recipe")] or lines
    subject = f"{found[1]}: " if (found := _SUBJECT.match(lines[0])) else ""
    return subject + "; ".join(_EXAMPLES.sub("", line).removeprefix(f"{SOURCE}: ") for line in said)


def use_obstacle(recipe: Recipe, cache_name: str | None, runtimes: Sequence[str]) -> str | None:
    """Why an artifact of ``recipe`` cannot be run by all of ``runtimes``, or not with that cache; None if it can."""
    if cache_name is not None:
        others = [name for name in runtimes if name != "cpu"]
        if others:
            return gettext(
                "a cache of {cache} is the cpu engine's; {runtime} keeps keys and values in its own way",
                cache=cache_name,
                runtime=others[0],
            )
        runtimes = ["cpu"]
    return next((why for name in runtimes if (why := runtime_obstacle(recipe, name)) is not None), None)


def runtime_obstacle(recipe: Recipe, runtime: str) -> str | None:
    """Why ``runtime`` does not run an artifact of ``recipe``; None if it does."""
    if runtime == "cpu":
        why = ENGINES.get(runtime)().supports(recipe)
        return None if why is None else gettext("the cpu engine does not run it: {why}", why=why)
    if runtime in runtimes_of(recipe):
        return None
    known = [obstacle.reason for obstacle in obstacles_of(recipe) if obstacle.target == runtime]
    if known:
        return f"{runtime} {gettext('; ').join(known)}"
    readable = [name for name in FORMATS.names() if runtime in FORMATS.get(name).runtimes]
    *others, last = readable or [""]
    told = {"runtime": runtime, "format": recipe.format}
    if not readable:
        return gettext("{runtime} does not read the format {format}: no format that quern writes is for it", **told)
    formats = gettext("{first} and {last}", first=gettext(", ").join(others), last=last) if others else last
    return gettext("{runtime} does not read the format {format}: it reads {formats}", **told, formats=formats)


def _accepted(first: Part, second: Part, keys: Keys, recipe: Recipe) -> Answer:
    """Of two parts that run together: whether one of them loses by the other, and what whoever stacks them should know."""
    parts = [first, second]
    if {first.kind, second.kind} & set(REMEDIES) and not {first.kind, second.kind} & {"codec", *NEUTRAL}:
        parts.append(Part("codec", recipe.weights.codec))  # for whose sake a remedy is there
    for _, _, why in losing({part: traits_of(part, recipe) for part in parts}):
        return Answer("degrades", why)
    said = [f"{part.name} {gettext(acts)}" for part in (first, second) if (acts := traits_of(part, recipe).acts)]
    if "overrides" in keys:
        told = {"name": second.name, "pattern": keys["overrides"][0]["pattern"]}
        said.append(gettext("each has linears of its own, {name} those that match {pattern}", **told))
    if "runtime" in (first.kind, second.kind) and "format" not in (first.kind, second.kind):
        said.append(gettext("in the format {format}", format=keys["format"]))
    if any(transform.get("random_signs") is False for transform in keys.get("transforms", ())):
        said.append(gettext("with {setting}", setting="random_signs: false"))
    return Answer("works", gettext("; ").join(said) or gettext("they do not touch each other"))
