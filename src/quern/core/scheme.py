"""How one weight matrix is stored: the name of a codec, and the parameters that this codec declares.

Parameters belong to codecs. What stands here knows of none of them but that they are pydantic models, found through the
registry of codecs, so that a recipe is checked when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from quern.core.registry import Registry

CODECS: Registry[Any] = Registry("codec", "quern.codecs")
"""Classes with an attribute ``Parameters``; ``quern.codecs.base`` says what else they are."""
NO_CODEC = "none"
"""In the place of a codec: the checkpoint's own values."""
USUAL = "integer"
"""The codec of a scheme that names none."""


class CodecParameters(BaseModel):
    """What a codec lets a recipe choose; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def int8_obstacle(self) -> str | None:
        """Why the stored weights cannot be multiplied with int8 activations, as a clause; None if they can."""
        return "names a codec that stores no int8 numbers"

    def input_group_obstacle(self, size: int) -> str | None:
        """Why they cannot where every ``size`` inputs have a scale of their own; asked only without an ``int8_obstacle``."""
        return None


@dataclass(frozen=True)
class CodecScheme:
    """A codec and its parameters. In recipes and artifacts both lie in one mapping: ``{codec: integer, bits: 4}``."""

    codec: str
    params: CodecParameters

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored as codes at all."""
        return self.codec != NO_CODEC

    def with_params(self, **changes: Any) -> CodecScheme:
        """The same with other values of some parameters, which are taken as they are."""
        return replace(self, params=self.params.model_copy(update=changes))

    def to_json(self) -> dict[str, Any]:
        """The mapping that ``parse_scheme`` reads back, all defaults spelled out."""
        return {"codec": self.codec, **self.params.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            parse_scheme,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda scheme: scheme.to_json()),
        )


def parse_scheme(values: object) -> CodecScheme:
    """A scheme from a mapping. Raises ``UserError`` for an unknown codec, ``ValueError`` for what its parameters are not.

    A key without a value (null) is as one that is not given. Beside ``codec: none`` no key means anything.
    """
    if isinstance(values, CodecScheme):
        return values
    if not isinstance(values, dict):
        raise ValueError("a weight scheme is a set of keys, such as {bits: 4}")
    codec = values.get("codec", USUAL)
    if codec == NO_CODEC:
        return UNQUANTIZED
    if not isinstance(codec, str):
        raise ValueError(f"codec must be a name, such as {USUAL}")
    model: type[CodecParameters] = CODECS.get(codec).Parameters
    given = {key: value for key, value in values.items() if key != "codec"}
    known = {key: value for key, value in given.items() if value is not None or key in model.model_fields}
    return CodecScheme(codec, model.model_validate(known))


UNQUANTIZED = CodecScheme(NO_CODEC, CodecParameters())


def scheme_keys(values: dict[str, Any]) -> list[str]:
    """The keys that a scheme like ``values`` may have."""
    return ["codec", *CODECS.get(values.get("codec", USUAL)).Parameters.model_fields]
