"""A recipe: the independent choices that make a quantized model (codec, granularity, observer, rounding, transforms,
activations, calibration). Recipes are data: YAML or JSON, unknown keys refused, the same text means the same bytes.
"""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from quern.core.allocation import Allocation, AllocationCandidate, Target
from quern.core.effort import split_effort, with_effort
from quern.core.errors import UserError
from quern.core.recipe_parts import (
    NEAREST,
    ROTATION,
    ROUNDINGS,
    Activations,
    Calibration,
    Padding,
    Rounding,
    Strict,
    Transform,
    Tuning,
)
from quern.core.registry import Registry
from quern.core.scheme import UNQUANTIZED, CodecScheme, parse_scheme, scheme_keys
from quern.core.text.encoding import decode_utf8
from quern.core.text.language import gettext
from quern.core.text.suggest import did_you_mean

RECIPE_PACKAGE = "quern.recipes"
WILDCARDS = frozenset("*?[")
"""What makes a pattern mean more than one name."""


MIXES: Registry[Any] = Registry("mix", "quern.formats.mixes")
"""Rules by which linears get types of ggml; ``quern.formats.mixes.base`` says what they are."""


class Override(Strict):
    """Other choices for the linears whose name matches ``pattern`` (shell wildcards).

    Beside the keys below stand those of a weight scheme. They go together: where one is given, the others have their
    defaults; where none is, the linears keep the scheme that they had.
    """

    pattern: str
    rounding: Rounding | None = None
    """Another rounding; null: that of the recipe."""
    rotated: bool | None = None
    """Whether the recipe's rotation of inputs reaches these linears; null: as it does without the override."""
    activations: Activations | None = None
    """What their inputs become at run time; null: as the recipe says."""
    scheme: CodecScheme | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather_scheme(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "scheme" in values:
            return values
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        scheme = {key: value for key, value in values.items() if key not in cls.model_fields}
        return {**own, "scheme": scheme} if scheme else own

    @model_serializer
    def _spread_scheme(self) -> dict[str, Any]:
        given = {key: getattr(self, key) for key in ("rounding", "rotated", "activations")}
        plain = {
            key: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            for key, value in given.items()
            if value is not None
        }
        return {**({} if self.scheme is None else self.scheme.to_json()), "pattern": self.pattern, **plain}

    def matches(self, linear: str) -> bool:
        """Whether this means the linear called ``linear`` (full dotted name)."""
        if WILDCARDS.isdisjoint(self.pattern):  # a plan has one such pattern for each linear
            return linear == self.pattern
        return fnmatch.fnmatchcase(linear, self.pattern)

    def matches_any(self, linears: Collection[str]) -> bool:
        """Whether it means one of ``linears``."""
        return self.pattern in linears or (not WILDCARDS.isdisjoint(self.pattern) and any(map(self.matches, linears)))


class Recipe(Strict):
    """The whole of what is done to a model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    mix: str | None = None
    """Name of a mix: rules by which each linear of a model gets one of ggml's block types, as llama.cpp's file types have
    them. It says ``weights``, ``embedding`` and ``head`` too; null: the recipe does."""
    weights: CodecScheme = Field(default_factory=lambda: parse_scheme({}))
    """Scheme of every linear inside the decoder blocks."""
    overrides: tuple[Override, ...] = ()
    """Later overrides win."""
    embedding: CodecScheme = UNQUANTIZED
    """Scheme of the token embedding (and of a head that is tied to it)."""
    head: CodecScheme = UNQUANTIZED
    """Scheme of an output head with its own weights."""
    transforms: tuple[Transform, ...] = ()
    rounding: Rounding = Rounding()
    head_rounding: Rounding = NEAREST
    """Of the output head, or of the embedding that is one; other embeddings are rounded to nearest."""
    activations: Activations = Activations()
    calibration: Calibration = Calibration()
    format: str = "quern"
    """Name of a registered on-disk format."""
    storage: Literal["plain", "entropy"] = "plain"
    """How tensors lie in the files: as they are, or entropy-coded and decoded when they are loaded."""
    allocation: Allocation | None = None
    """Schemes that linears may get, to be chosen for a model by a target; null: all schemes are said above."""
    tuning: Tuning | None = None
    """What of each block is trained once it is rounded; null: nothing."""
    padding: Padding | None = None
    """Zeros that make an odd size fit a format or a runtime; null: none."""

    @model_serializer(mode="wrap")
    def _without_later_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes are older than these keys: without them they stay what they were, in artifacts and fingerprints."""
        data: dict[str, Any] = dump(self)
        nearest = NEAREST.model_dump(mode="json")
        usual = {"storage": "plain", "head_rounding": nearest} | dict.fromkeys(
            ("allocation", "tuning", "mix", "padding")
        )
        return {key: value for key, value in data.items() if key not in usual or value != usual[key]}

    @model_validator(mode="before")
    @classmethod
    def _of_mix(cls, values: Any) -> Any:
        """With the usual types of its mix, which a model may change (``quern.formats.mixes.base.settled``)."""
        if not isinstance(values, dict) or not isinstance(values.get("mix"), str):
            return values
        mix = MIXES.get(values["mix"])
        usual = {"weights": mix.usual, "embedding": mix.embedding or mix.usual, "head": mix.head}
        said = {key: parse_scheme({"codec": "ggml", "type": kind}) for key, kind in usual.items()}
        if given := [key for key, scheme in said.items() if key in values and parse_scheme(values[key]) != scheme]:
            raise ValueError(f"mix {values['mix']} says what {given[0]} becomes; leave one of the two out")
        return {**values, **said}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.mix is not None and self.allocation is not None:
            raise ValueError("a mix says of each linear what an allocation would choose; leave one of the two out")
        methods = [transform.method for transform in self.transforms]
        if methods.count(ROTATION) > 1:
            raise ValueError(f"transform {ROTATION} is named twice; once is enough")
        schemes: dict[str, tuple[CodecScheme, Activations]] = {"weights": (self.weights, self.activations)}
        for override in self.overrides:
            schemes[override.pattern] = (override.scheme or self.weights, override.activations or self.activations)
            if override.rotated and not self.rotated:
                raise ValueError(f"{override.pattern} is to be rotated, but the recipe has no transform that rotates")
        roundings = [self.rounding, *(o.rounding for o in self.overrides if o.rounding is not None)]
        self._check_head_rounding()
        if self.tuning is not None and self.allocation is None and not any(s.quantized for s, _ in schemes.values()):
            raise ValueError("tuning trains quantized linears, and no scheme here quantizes one. Leave it out")
        if any(rounding.two_sided for rounding in roundings) and self.calibration.token_weight != "fisher":
            raise ValueError("two_sided rounding needs gradients: calibration: {token_weight: fisher}")
        if self.allocation is not None:
            self._check_allocation(self.allocation)
            named = {f"candidate {one.scheme.to_json()}": one.scheme for one in self.allocation.candidates}
            schemes |= {where: (scheme, self.activations) for where, scheme in named.items()}
        for where, (scheme, activations) in schemes.items():
            if activations.mode == "none" or not scheme.quantized:
                continue
            if obstacle := scheme.params.int8_obstacle():
                raise ValueError(f"int8 activations need symmetric integer weights; {where} {obstacle}")
            size = activations.group_size
            if size is not None and (obstacle := scheme.params.input_group_obstacle(size)):
                raise ValueError(f"groups of {size} int8 activations need weights that fit them; {where} {obstacle}")
        return self

    def _check_head_rounding(self) -> None:
        if self.head_rounding != NEAREST and not (self.head.quantized or self.embedding.quantized):
            raise ValueError(
                "head_rounding is of a head that is quantized: give it a scheme, or leave head_rounding out"
            )
        if self.head_rounding.two_sided or self.head_rounding.target != "own":
            raise ValueError("head_rounding knows neither two_sided nor target: drift")
        if ROUNDINGS.get(self.head_rounding.method).needs_hessian and self.calibration.token_weight != "fisher":
            raise ValueError(
                f"head_rounding {self.head_rounding.method} counts tokens by their gradients: calibration: "
                "{token_weight: fisher}"
            )

    def _check_allocation(self, allocation: Allocation) -> None:
        scaling = [transform.method for transform in self.transforms if transform.method != ROTATION]
        if scaling:
            raise ValueError(
                f"losses of candidates are measured on the weights as they are or rotated, which transform {scaling[0]} "
                "would change. Remove it or the allocation"
            )
        if self.calibration.token_weight != "fisher":
            raise ValueError("an allocation needs calibration: {token_weight: fisher}, which losses are computed from")
        if not self.rotated and any(candidate.rotated for candidate in allocation.candidates):
            raise ValueError("a candidate is to be rotated, but the recipe has no transform that rotates")

    def targeting(self, target: Target) -> Recipe:
        """The same with another target of its allocation, and a name that says so. Raises ``UserError`` without one."""
        if self.allocation is None:
            raise UserError(
                gettext(
                    "recipe {name!r} has no allocation, so no target can be set for it: its schemes are fixed. Use "
                    "the recipe auto, or add candidates under allocation",
                    name=self.name,
                )
            )
        allocation = self.allocation.model_copy(update={"target": target})
        return self.model_copy(update={"name": f"{self.name}-{target.label}", "allocation": allocation})

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of activations are used at all."""
        if self.allocation is not None or self.tuning is not None:
            return True
        if any(transform.method != ROTATION for transform in self.transforms):
            return True
        roundings = [self.rounding, self.head_rounding, *(o.rounding for o in self.overrides if o.rounding is not None)]
        activations = [self.activations, *(o.activations for o in self.overrides if o.activations is not None)]
        return any(ROUNDINGS.get(r.method).needs_hessian for r in roundings) or any(
            a.mode == "static" for a in activations
        )

    @property
    def rotation(self) -> Transform | None:
        """The rotation of the inputs of the quantized linears in the decoder blocks at run time; None: none."""
        return next((transform for transform in self.transforms if transform.method == ROTATION), None)

    @property
    def rotated(self) -> bool:
        """Whether there is a rotation."""
        return self.rotation is not None

    @property
    def random_signs(self) -> bool:
        """Whether the rotation turns the signs of random columns."""
        return any(t.method == ROTATION and t.random_signs is not False for t in self.transforms)

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``parse_recipe`` reads back."""
        return self.model_dump(mode="json")


def parse_recipe(data: object, source: str) -> Recipe:
    """A recipe from plain data; ``source`` names where it came from in the ``UserError`` of a bad one."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(
            f"recipe {source} is not valid:\n" + "\n".join(_explain(item, data) for item in error.errors())
        ) from None


def _explain(item: Any, data: object) -> str:
    """A line that says what is wrong and where."""
    loc = [part for part in item["loc"] if part != "scheme"]  # where an override's scheme lies is nobody's concern
    where = ".".join(map(str, loc)) or "recipe"
    if item["type"] == "extra_forbidden":
        known, meant = _known_keys(loc[:-1], data), str(loc[-1])
        return f"  {where}: unknown key; known keys here: {', '.join(known)}{did_you_mean(meant, known)}"
    return f"  {where}: {item['msg'].removeprefix('Value error, ')} (got {str(item.get('input'))[:80]!r})"


def _known_keys(loc: list[Any], data: object) -> list[str]:
    """The keys of the mapping that lies at ``loc`` in a recipe's ``data``."""
    place: Any = data
    for part in loc:
        place = place[part]
    if not loc:
        return list(Recipe.model_fields)
    field = Recipe.model_fields[str(loc[0])].annotation
    if field is CodecScheme:
        return scheme_keys(place)
    if loc[0] == "allocation":
        return _known_allocation_keys(loc, place)
    if loc[0] == "overrides" and len(loc) == 2:
        return [*(key for key in Override.model_fields if key != "scheme"), *scheme_keys(place)]
    last = {"overrides": Override, "transforms": Transform}.get(str(loc[0]), field) if len(loc) < 3 else None
    model: Any = last or Override.model_fields[str(loc[2])].annotation
    found = [model, *get_args(model)]
    return next(list(m.model_fields) for m in found if isinstance(m, type) and issubclass(m, BaseModel))


def _known_allocation_keys(loc: list[Any], place: Any) -> list[str]:
    """The keys of ``place``, which lies at ``loc`` in an allocation."""
    if len(loc) == 1:
        return list(Allocation.model_fields)
    if loc[1] == "target":
        return list(Target.model_fields)
    own = [key for key in AllocationCandidate.model_fields if key != "scheme"] if loc[1] == "candidates" else []
    return [*own, *scheme_keys(place)]


def profile_names() -> list[str]:
    """The recipes that ship with the package, sorted."""
    return sorted(
        f.name.removesuffix(".yaml") for f in resources.files(RECIPE_PACKAGE).iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by its name, or a YAML or JSON file by its path, with an effort behind an @ or without.

    Raises ``UserError`` for anything else.
    """
    text, effort = str(name_or_path), None
    if not Path(text).is_file():
        text, effort = split_effort(text)
    path = Path(text)
    if text in profile_names():
        data = yaml.safe_load((resources.files(RECIPE_PACKAGE) / f"{text}.yaml").read_text("utf-8"))
        return parse_recipe(with_effort(data, effort, text), text)
    if not path.is_file():
        raise UserError(
            gettext(
                "no recipe {text!r}: neither a file nor one of the shipped ones ({known}){hint}",
                text=text,
                known=", ".join(profile_names()),
                hint=did_you_mean(text, profile_names()),
            )
        )
    content = decode_utf8(f"recipe {path}", path.read_bytes())
    try:
        if path.suffix == ".json":
            data = json.loads(content, object_pairs_hook=_unique)
        else:
            data = yaml.load(content, _UniqueLoader)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: also dates and numbers that Python has not
        raise UserError(gettext("recipe {path} is neither YAML nor JSON: {error}", path=path, error=error)) from None
    except RecursionError:
        raise UserError(gettext("recipe {path} is nested too deeply", path=path)) from None
    if not isinstance(data, dict):
        what = (
            gettext("is empty")
            if data is None
            else gettext("is not a set of keys but a {type}", type=type(data).__name__)
        )
        raise UserError(
            gettext("recipe {path} {what}. It needs at least a name, such as: name: mine", path=path, what=what)
        )
    return parse_recipe(with_effort(data, effort, text), text)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping whose keys differ; of two that are equal the first would be ignored silently. Raises ``ValueError``."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"it names {str(key)[:80]!r} twice")
    return dict(pairs)


class _UniqueLoader(yaml.SafeLoader):
    """YAML without code, and without keys that occur twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        made: dict[Any, Any] = super().construct_mapping(node, deep)  # refuses keys that cannot be keys
        _unique([(self.construct_object(key, deep=True), None) for key in own])
        return made
