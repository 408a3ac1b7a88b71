"""The plan of a quantization: for every matrix of a model, by full name, what it becomes. Made once, of recipe and names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from quern.core.recipe import WILDCARDS, Override, Recipe
from quern.core.recipe_parts import NEAREST, Activations, Rounding, Transform
from quern.core.scheme import UNQUANTIZED, CodecScheme

AS_THEY_ARE = Activations()
"""What the inputs of most matrices become."""


@dataclass(frozen=True)
class LinearPlan:
    """What one matrix becomes."""

    scheme: CodecScheme
    rounding: Rounding = NEAREST
    rotation: Transform | None = None
    """The rotation of its inputs; None: none."""
    activations: Activations = AS_THEY_ARE

    @property
    def quantized(self) -> bool:
        """Whether the matrix is stored as codes at all."""
        return self.scheme.quantized

    def with_scale_dtype(self, dtype: str) -> LinearPlan:
        """The same with scales stored as ``dtype``."""
        return replace(self, scheme=self.scheme.with_params(scale_dtype=dtype))


KEPT = LinearPlan(UNQUANTIZED)
"""Of a matrix that stays as it is."""


class Plan(Mapping[str, LinearPlan]):
    """Plans by full name: embedding and head first, then the linears of all blocks in order."""

    def __init__(self, plans: Mapping[str, LinearPlan]) -> None:
        self._plans = dict(plans)

    def __getitem__(self, name: str) -> LinearPlan:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def quantized(self) -> dict[str, LinearPlan]:
        """Those that are stored as codes."""
        return {name: plan for name, plan in self._plans.items() if plan.quantized}

    def changed(self, scale_dtypes: Mapping[str, str]) -> Plan:
        """The plan with other dtypes for the scales of some modules."""
        return Plan({**self._plans, **{name: self[name].with_scale_dtype(d) for name, d in scale_dtypes.items()}})

    def replaced(self, plans: Mapping[str, LinearPlan]) -> Plan:
        """The plan with others for some modules."""
        return Plan({**self._plans, **plans})


def make_plan(recipe: Recipe, linears: Iterable[str], embedding: str, head: str | None) -> Plan:
    """The plan of ``recipe`` for the decoder linears of these full names; ``head`` None: the embedding is the head."""
    outer = {embedding: LinearPlan(recipe.embedding, recipe.head_rounding if head is None else NEAREST)}
    if head is not None:
        outer[head] = LinearPlan(recipe.head, recipe.head_rounding)
    return Plan(outer | {name: plan_for(recipe, name) for name in linears})


def plan_for(recipe: Recipe, linear: str) -> LinearPlan:
    """What ``recipe`` makes of the decoder linear called ``linear`` (full dotted name); later overrides win."""
    plan = _overridden(recipe, linear)
    return plan if plan.quantized else KEPT


def candidates_for(recipe: Recipe, linear: str) -> list[LinearPlan]:
    """What the decoder linear of this full name may become by the recipe's allocation: its candidates, or the one scheme
    that an override names. What overrides without a scheme say, all candidates have in common."""
    assert recipe.allocation is not None
    usual = _overridden(recipe, linear)
    if any(override.scheme is not None for override in _meaning(recipe, linear)):
        return [usual if usual.quantized else KEPT]
    found = []
    for candidate in recipe.allocation.candidates:
        rotation = usual.rotation if candidate.rotated is None else recipe.rotation if candidate.rotated else None
        plan = replace(usual, scheme=candidate.scheme, rotation=rotation)
        found.append(plan if plan.quantized else KEPT)
    return found


def rotation_for(recipe: Recipe, linear: str) -> Transform | None:
    """The rotation of the inputs of the decoder linear of this full name, if it is quantized at all."""
    return _overridden(recipe, linear).rotation


def _overridden(recipe: Recipe, linear: str) -> LinearPlan:
    plan = LinearPlan(recipe.weights, recipe.rounding, recipe.rotation, recipe.activations)
    for override in _meaning(recipe, linear):
        plan = LinearPlan(
            plan.scheme if override.scheme is None else override.scheme,
            override.rounding or plan.rounding,
            plan.rotation if override.rotated is None else (recipe.rotation if override.rotated else None),
            override.activations or plan.activations,
        )
    return plan


_known: tuple[tuple[Override, ...], dict[str, list[int]]] = (), {}
"""Overrides of the last recipe that was asked, and their places by the linear that they name; "": those with wildcards."""


def _meaning(recipe: Recipe, linear: str) -> list[Override]:
    """Those that mean ``linear``, in order; names are looked up, since a plan has one for each of thousands of linears."""
    global _known
    overrides, places = _known
    if overrides is not recipe.overrides:
        overrides, places = recipe.overrides, {}
        for place, one in enumerate(overrides):
            places.setdefault(one.pattern if WILDCARDS.isdisjoint(one.pattern) else "", []).append(place)
        _known = overrides, places
    found = [place for place in places.get("", ()) if overrides[place].matches(linear)]
    return [overrides[place] for place in sorted([*found, *places.get(linear, ())])]
