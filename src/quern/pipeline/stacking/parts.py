"""The parts that stacks are made of: everything registered, and what a recipe may say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from quern.codecs.base import CODECS, codec_of
from quern.core.recipe import Recipe
from quern.core.recipe_parts import ROTATION
from quern.core.scheme import USUAL, CodecScheme
from quern.core.stacking import NO_TRAITS, Part, PartKind, Traits
from quern.engines.cpu import CACHES, ORDINARY
from quern.formats.base import FORMATS
from quern.quantization.rounding.base import ROUNDINGS
from quern.quantization.transforms.base import TRANSFORMS

Keys = dict[str, Any]
"""Keys of a recipe."""

RUNTIMES = ("cpu", "transformers", "vllm", "llama.cpp", "onnxruntime")
"""What runs an artifact: quern's cpu engine, and other programs."""
PLAIN_CACHES = (ORDINARY, "float32")
"""Of key/value caches those that round nothing worth speaking of."""
SECOND_LINEARS = "*.mlp.*"
"""Where two parts of a kind exclude each other, these linears get the second one."""
REMEDIES = ("transform", "rounding")
"""Kinds of parts that are there so that codecs lose less."""
NEUTRAL = ("storage", "format", "runtime")
"""Kinds of parts that change no number."""
GROUP = 128
"""Inputs that share a scale where activations are rounded by groups: as many as share one of the usual integers'."""
ACTIVATIONS: dict[str, Keys] = {
    "token": {"mode": "dynamic"},
    "group": {"mode": "dynamic", "granularity": "group", "group_size": GROUP},
    "static": {"mode": "static"},
}
"""Int8 activations by who shares a scale; ``static``: all tokens, by calibration."""
PLAIN: Keys = {
    "name": "stack",
    "weights": {"codec": USUAL},
    "rounding": {"method": "nearest"},
    "calibration": {"token_weight": "none"},
}
"""What a part is added to: 4-bit integers, rounded to nearest."""


def all_parts() -> list[Part]:
    """Every part, by kind. A rounding that keeps the values of a quantized checkpoint is none: it loses nothing whatever it
    is used with, and is not for other checkpoints."""
    names: dict[PartKind, Sequence[str]] = {
        "transform": TRANSFORMS.names(),
        "rounding": [name for name in ROUNDINGS.names() if not ROUNDINGS.get(name).keeps_values],
        "codec": CODECS.names(),
        "activations": list(ACTIVATIONS),
        "storage": ["entropy"],
        "cache": [name for name in CACHES if name not in PLAIN_CACHES],
        "format": FORMATS.names(),
        "runtime": RUNTIMES,
    }
    assert set(names) == set(get_args(PartKind))
    return [Part(kind, name) for kind, found in names.items() for name in found]


def parts_of(recipe: Recipe, cache: str | None = None, runtime: str | None = None) -> list[Part]:
    """The parts of a recipe and of how it is used; a codec that only stores embedding or head is none."""
    roundings = [recipe.rounding, *(o.rounding for o in recipe.overrides if o.rounding is not None)]
    modes = [recipe.activations, *(o.activations for o in recipe.overrides if o.activations is not None)]
    found = [Part("transform", transform.method) for transform in recipe.transforms]
    found += [Part("rounding", rounding.method) for rounding in roundings]
    found += [Part("codec", scheme.codec) for scheme in _schemes(recipe)]
    for mode in modes:
        if mode.mode != "none":
            name = "static" if mode.mode == "static" else "group" if mode.group_size else "token"
            found.append(Part("activations", name))
    if recipe.storage != "plain":
        found.append(Part("storage", recipe.storage))
    if cache is not None and cache not in PLAIN_CACHES:
        found.append(Part("cache", cache))
    found.append(Part("format", recipe.format))
    if runtime is not None:
        found.append(Part("runtime", runtime))
    return list(dict.fromkeys(found))


def traits_of(part: Part, recipe: Recipe) -> Traits:
    """What a part of ``recipe`` declares of itself; parts that are no component of their own declare nothing."""
    if part.kind == "codec":
        declared = [codec_of(scheme).traits for scheme in _schemes(recipe) if scheme.codec == part.name]
        return next((traits for traits in declared if traits != NO_TRAITS), NO_TRAITS)
    if part.kind == "transform":
        return TRANSFORMS.get(part.name).traits
    return ROUNDINGS.get(part.name).traits if part.kind == "rounding" else NO_TRAITS


def _schemes(recipe: Recipe) -> list[CodecScheme]:
    """Those that linears of the decoder blocks may have."""
    if recipe.allocation is not None:
        return [candidate.scheme for candidate in recipe.allocation.candidates]
    overriding = (override.scheme for override in recipe.overrides)
    return [scheme for scheme in (recipe.weights, *overriding) if scheme is not None and scheme.quantized]


def variants(part: Part) -> list[Keys]:
    """What a recipe says to use ``part``, the usual first and then what other parts may need of it."""
    if part.kind == "transform":
        usual: Keys = {"method": part.name}
        found = [{"transforms": [usual]}]
        return [*found, {"transforms": [{**usual, "random_signs": False}]}] if part.name == ROTATION else found
    if part.kind == "rounding":
        return [{"rounding": {"method": part.name}}]
    if part.kind == "codec":
        byte_wide = {"codec": part.name, "bits": 8, "granularity": "channel"}
        return [{"weights": {"codec": part.name}}, *([{"weights": byte_wide}] if part.name == USUAL else [])]
    if part.kind == "activations":
        return [{"activations": ACTIVATIONS[part.name], "weights": _BYTES}, {"activations": ACTIVATIONS[part.name]}]
    return [{part.kind: part.name}] if part.kind in ("storage", "format") else [{}]


_BYTES = {"codec": USUAL, "bits": 8, "granularity": "channel"}


def merged(first: Keys, second: Keys) -> Keys:
    """What a recipe says to use both: transforms one behind the other; of two that exclude each other the second gets some
    linears of its own."""
    keys = {**first, **second}
    if "transforms" in first and "transforms" in second:
        keys["transforms"] = [*first["transforms"], *second["transforms"]]
    for key in ("weights", "rounding", "activations"):
        if key in first and key in second and first[key] != second[key]:
            keys[key] = first[key]
            own = second[key] if key == "weights" else {key: second[key]}
            keys.setdefault("overrides", []).append({"pattern": SECOND_LINEARS, **own})
    return keys
