"""The independent choices that a recipe is made of, but for schemes and overrides: rounding, transforms, activations,
calibration."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from quern.core.registry import Registry

ROUNDINGS: Registry[Any] = Registry("rounding", "quern.quantization.rounding")
"""Classes that say what they need; ``quern.quantization.rounding.base`` says what else they are."""
ROTATION = "hadamard"
"""The transform that the model repeats on its inputs when it runs."""


class Strict(BaseModel):
    """Data whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_LATER_KEYS: dict[str, Any] = {"target": "own", "sweeps": 0, "two_sided": False}
"""Keys of ``Rounding`` that recipes had not from the beginning, with what they were without them."""


class Rounding(Strict):
    """Which stored value each weight becomes."""

    method: str = "gptq"
    """Name of a registered rounding: ``nearest``, ``gptq`` or ``stored``."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    activation_order: bool = False
    """Round the columns of largest Hessian diagonal first; scales are then fitted before rounding starts."""
    block_size: Annotated[int, Field(ge=1)] = 128
    """Columns between two matrix products of the error feedback (speed only; the result is the same up to rounding)."""
    target: Literal["own", "drift"] = "own"
    """What ``gptq`` rounds towards: the linear's ``own`` weights, or those that make up for what the inputs have drifted by
    because everything before them is quantized."""
    sweeps: Annotated[int, Field(ge=0, le=16)] = 0
    """How often ``gptq`` goes over all columns again, each rounded anew with all others as they are, and scales refitted."""
    two_sided: bool = False
    """Whether ``gptq`` counts how errors of different rows go together; rows then make up for those before them."""

    @model_validator(mode="after")
    def _check(self) -> Rounding:
        asked = [key for key, usual in _LATER_KEYS.items() if getattr(self, key) != usual]
        if asked and not ROUNDINGS.get(self.method).needs_hessian:
            raise ValueError(
                f"{' and '.join(asked)} {'go' if len(asked) > 1 else 'goes'} with a rounding that reads Hessians (gptq), "
                f"not with {self.method}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_later_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes are older than these keys: without them they stay what they were, in artifacts and fingerprints."""
        data: dict[str, Any] = dump(self)
        return {key: value for key, value in data.items() if key not in _LATER_KEYS or value != _LATER_KEYS[key]}


NEAREST = Rounding(method="nearest")
"""How matrices outside of the decoder blocks are rounded where nothing is said."""


class Transform(Strict):
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


_USUAL_GRANULARITY = {"dynamic": "token", "static": "tensor"}


class Activations(Strict):
    """What the inputs of the quantized linears become at run time."""

    mode: Literal["none", "dynamic", "static"] = "none"
    """``dynamic``: int8 with scales of each token's own; ``static``: int8 with a calibrated scale."""
    observer: str = "min_max"
    """Range of a static scale."""
    granularity: Literal["tensor", "token", "group"] | None = None
    """Who shares a scale; None: all tokens (``tensor``) where static, a ``token`` where dynamic, which also takes
    ``group``. Saying the usual one is as saying nothing."""
    group_size: Annotated[int, Field(ge=1)] | None = None
    """Inputs of a token that share a scale under ``group``, and only with it."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_usual(cls, values: Any) -> Any:
        if isinstance(values, dict):
            usual = _USUAL_GRANULARITY.get(str(values.get("mode")))
            if usual is not None and values.get("granularity") == usual:
                return {key: value for key, value in values.items() if key != "granularity"}
        return values

    @model_validator(mode="after")
    def _check_granularity(self) -> Activations:
        if self.granularity is not None and (self.mode, self.granularity) != ("dynamic", "group"):
            raise ValueError(
                "activations take granularity token or group with mode dynamic, and tensor with mode static; "
                f"got {self.granularity} with {self.mode}"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size of activations goes with granularity: group, which needs it")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        given: dict[str, Any] = serialize(self)
        return {key: value for key, value in given.items() if value is not None}


TEXT_AUTO: Final = "auto"
"""In place of a number of calibration tokens: as many as are worth it."""


class Calibration(Strict):
    """Which text the statistics come from and how its tokens are weighted."""

    tokens: Annotated[int, Field(ge=1)] = 16384
    """Tokens of calibration text."""
    sequence_length: Annotated[int, Field(ge=1)] = 512
    """Tokens of one calibration sequence."""
    token_weight: Literal["fisher", "norm", "none"] = "fisher"
    """How much a token counts in the Hessian: its squared loss gradient, its inverse squared norm, or 1."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the calibration passes; ``auto``: float32 below 10^9 parameters, bfloat16 from there on."""


class Tuning(Strict):
    """What of a block is trained, once it is rounded, before the next one is."""

    method: Literal["block"] = "block"
    """Towards the outputs that the block has in the unquantized model."""
    train: Literal["scales", "codes"] = "codes"
    """``scales`` moves no code; ``codes`` trains latent weights and the scales of the grid too."""
    passes: Annotated[int, Field(ge=1, le=256)] = 3
    """How often the calibration tokens are gone through."""
    between: Annotated[int, Field(ge=0, le=256)] = 1
    """The same after each stage of linears but the last, when what is not rounded yet is trained to make up for it."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of numbers without a unit; None: the usual one."""


class Padding(Strict):
    """Rows and columns of zeros that a model gets before it is quantized, and with which it computes the same."""

    intermediate: Annotated[int, Field(ge=2, le=65536)]
    """What divides the intermediate size: zeros are added up to the next multiple."""
