"""A recipe: the independent choices that make a quantized model (codec, granularity, observer, rounding, transforms,
activations, calibration). Recipes are data: YAML or JSON, unknown keys refused, the same text means the same bytes.
"""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quern.core.encoding import decode_utf8
from quern.core.errors import UserError
from quern.core.suggest import did_you_mean

RECIPE_PACKAGE = "quern.recipes"
ROTATION = "hadamard"
"""The transform that the model repeats on its inputs when it runs."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightScheme(_Strict):
    """Which values a weight matrix may take and who shares a scale."""

    codec: str = "integer"
    """Name of a registered codec; ``none`` keeps the checkpoint's own values."""
    bits: Annotated[int, Field(ge=1, le=8)] = 4
    """Bits of one stored code."""
    symmetric: bool = True
    """Symmetric grids have their zero in the middle; asymmetric ones store a zero point for each scale."""
    granularity: Literal["tensor", "channel", "group"] = "group"
    """Who shares a scale: the tensor, one output channel (row), or ``group_size`` inputs of a row."""
    group_size: Annotated[int, Field(ge=1)] | None = 128
    """Inputs that share a scale under ``group`` (the last group of a row may be shorter); otherwise null."""
    observer: str = "mean_squared_error"
    """Name of the observer that picks the range that the scale covers."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """How scales are stored."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Codec ``trellis``: bits of the stream that pick an entry of a table (default 7); otherwise null."""
    tables: Annotated[int, Field(ge=1)] | None = None
    """Codec ``trellis``: tables whose entries are added (default 2); otherwise null."""

    @model_validator(mode="before")
    @classmethod
    def _fill_dependent_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("codec") == "trellis":
            values = {"granularity": "channel", "window": 7, "tables": 2, **values}
        if values.get("granularity", "group") != "group":
            values = {"group_size": None, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> WeightScheme:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity: group, and only with it")
        if self.codec != "trellis" and (self.window, self.tables) != (None, None):
            raise ValueError(f"window and tables go with codec trellis, not with {self.codec}")
        return self

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored as codes at all."""
        return self.codec != "none"


UNQUANTIZED = WeightScheme(codec="none", bits=8, granularity="tensor", group_size=None)


class Rounding(_Strict):
    """Which stored value each weight becomes."""

    method: str = "gptq"
    """Name of a registered rounding: ``nearest`` or ``gptq``."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    activation_order: bool = False
    """Round the columns of largest Hessian diagonal first; scales are then fitted before rounding starts."""
    block_size: Annotated[int, Field(ge=1)] = 128
    """Columns between two matrix products of the error feedback (speed only; the result is the same up to rounding)."""


class Transform(_Strict):
    """An exact rewriting of the weights before quantization."""

    method: str
    """Name of a registered transform: ``awq``, ``hadamard`` or ``smoothquant``."""
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """SmoothQuant's alpha (default 0.5). The others take none."""
    random_signs: bool | None = None
    """Whether ``hadamard`` turns the signs of random columns first (default true). The others take none."""

    @model_validator(mode="after")
    def _check(self) -> Transform:
        if self.random_signs is not None and self.method != ROTATION:
            raise ValueError(f"random_signs goes with transform {ROTATION}, not with {self.method}")
        return self


class Activations(_Strict):
    """What the inputs of the quantized linears become at run time."""

    mode: Literal["none", "dynamic", "static"] = "none"
    """``dynamic``: int8 with one scale a token; ``static``: int8 with one calibrated scale a tensor."""
    observer: str = "min_max"
    """Range of a static scale."""


class Calibration(_Strict):
    """Which text the statistics come from and how its tokens are weighted."""

    tokens: Annotated[int, Field(ge=1)] = 16384
    """Tokens of calibration text."""
    sequence_length: Annotated[int, Field(ge=1)] = 512
    """Tokens of one calibration sequence."""
    token_weight: Literal["fisher", "norm", "none"] = "fisher"
    """How much a token counts in the Hessian: its squared loss gradient, its inverse squared norm, or 1."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the calibration passes; ``auto``: float32 below 10^9 parameters, bfloat16 from there on."""


class Override(WeightScheme):
    """Another weight scheme for the linears whose name matches ``pattern`` (shell wildcards)."""

    pattern: str

    def matches(self, linear: str) -> bool:
        """Whether this means the linear called ``linear`` (full dotted name)."""
        return fnmatch.fnmatchcase(linear, self.pattern)


class Recipe(_Strict):
    """The whole of what is done to a model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    weights: WeightScheme = WeightScheme()
    """Scheme of every linear inside the decoder blocks."""
    overrides: tuple[Override, ...] = ()
    """Later overrides win."""
    embedding: WeightScheme = UNQUANTIZED
    """Scheme of the token embedding (and of a head that is tied to it)."""
    head: WeightScheme = UNQUANTIZED
    """Scheme of an output head with its own weights."""
    transforms: tuple[Transform, ...] = ()
    rounding: Rounding = Rounding()
    activations: Activations = Activations()
    calibration: Calibration = Calibration()
    format: str = "quern"
    """Name of a registered on-disk format."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        methods = [transform.method for transform in self.transforms]
        if methods.count(ROTATION) > 1:
            raise ValueError(f"transform {ROTATION} is named twice; once is enough")
        if self.activations.mode != "none":
            schemes = {"weights": self.weights, **{o.pattern: o for o in self.overrides}}
            for where, scheme in schemes.items():
                if scheme.quantized and (scheme.bits != 8 or not scheme.symmetric or scheme.granularity == "group"):
                    raise ValueError(
                        f"int8 activations need 8-bit symmetric weights per channel or tensor; {where} asks for "
                        f"{scheme.bits} bits, symmetric: {scheme.symmetric}, granularity: {scheme.granularity}"
                    )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of activations are used at all."""
        scaled = any(transform.method != ROTATION for transform in self.transforms)
        return self.rounding.method != "nearest" or scaled or self.activations.mode == "static"

    @property
    def rotated(self) -> bool:
        """Whether the inputs of the quantized linears in the decoder blocks are rotated at run time."""
        return any(transform.method == ROTATION for transform in self.transforms)

    @property
    def random_signs(self) -> bool:
        """Whether the rotation turns the signs of random columns."""
        return any(t.method == ROTATION and t.random_signs is not False for t in self.transforms)

    def scheme_for(self, linear: str) -> WeightScheme:
        """The scheme of the decoder linear called ``linear`` (full dotted name)."""
        scheme = self.weights
        for override in self.overrides:
            if override.matches(linear):
                scheme = WeightScheme(**override.model_dump(exclude={"pattern"}))
        return scheme

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``parse_recipe`` reads back."""
        return self.model_dump(mode="json")


def parse_recipe(data: object, source: str) -> Recipe:
    """A recipe from plain data; ``source`` names where it came from in the ``UserError`` of a bad one."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(
            f"recipe {source} is not valid:\n" + "\n".join(_explain(item) for item in error.errors())
        ) from None


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        model: type[BaseModel] = Recipe
        for part in item["loc"][:-1]:
            if isinstance(part, str) and part in model.model_fields:
                annotation = model.model_fields[part].annotation
                if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                    model = annotation
        known, meant = list(model.model_fields), str(item["loc"][-1])
        return f"  {where}: unknown key; known keys here: {', '.join(known)}{did_you_mean(meant, known)}"
    return f"  {where}: {item['msg'].removeprefix('Value error, ')} (got {str(item.get('input'))[:80]!r})"


def profile_names() -> list[str]:
    """The recipes that ship with the package, sorted."""
    return sorted(
        f.name.removesuffix(".yaml") for f in resources.files(RECIPE_PACKAGE).iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by its name, or a YAML or JSON file by its path. Raises ``UserError`` for anything else."""
    text = str(name_or_path)
    path = Path(name_or_path)
    if text in profile_names():
        return parse_recipe(yaml.safe_load((resources.files(RECIPE_PACKAGE) / f"{text}.yaml").read_text("utf-8")), text)
    if not path.is_file():
        raise UserError(
            f"no recipe {text!r}: neither a file nor one of the shipped ones ({', '.join(profile_names())})"
            f"{did_you_mean(text, profile_names())}"
        )
    content = decode_utf8(f"recipe {path}", path.read_bytes())
    try:
        if path.suffix == ".json":
            data = json.loads(content, object_pairs_hook=_unique)
        else:
            data = yaml.load(content, _UniqueLoader)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: also dates and numbers that Python has not
        raise UserError(f"recipe {path} is neither YAML nor JSON: {error}") from None
    except RecursionError:
        raise UserError(f"recipe {path} is nested too deeply") from None
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"is not a set of keys but a {type(data).__name__}"
        raise UserError(f"recipe {path} {what}. It needs at least a name, such as: name: mine")
    return parse_recipe(data, text)


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
