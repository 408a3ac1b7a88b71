"""Codecs: which values can be stored, and how they lie in bits.

A codec knows nothing of error feedback, and a rounding nothing of codes: rounding asks an ``Encoder`` to "round this
column" and feeds the error forward, whatever the codec is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from quern.core import scheme as schemes
from quern.core.packed import QuantizedWeight
from quern.core.registry import Registry
from quern.core.scheme import CodecParameters, CodecScheme

Parts = dict[str, Tensor]
TINY = 2.0**-24
"""Scale of weights that are all zero, and least float16 scale: the smallest float16 above zero."""


def least_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale``, but never so small that ``dtype`` would make nothing of it; ``TINY`` for no scale at all."""
    if dtype == torch.float16:
        return scale.clamp(min=TINY)
    return torch.where(scale == 0, TINY, scale.clamp(min=torch.finfo(dtype).tiny))


class ScaledParameters(CodecParameters):
    """What codecs with scales share."""

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

    @model_validator(mode="before")
    @classmethod
    def _no_group_without_granularity(cls, values: Any) -> Any:
        usual = cls.model_fields["granularity"].default
        if isinstance(values, dict) and values.get("granularity", usual) != "group":
            return {"group_size": None, **values}
        return values

    @model_validator(mode="after")
    def _check_group(self) -> ScaledParameters:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity: group, and only with it")
        return self

    def int8_obstacle(self) -> str | None:
        if self.bits == 8 and self.symmetric and self.granularity != "group":
            return None
        return f"asks for {self.bits} bits, symmetric: {self.symmetric}, granularity: {self.granularity}"


class Encoder(ABC):
    """Rounds the columns of one slab of rows and remembers the codes.

    Columns come in tuples of ``width``, of which the last may be shorter. Tuples may come in any order, each exactly once.
    Values are float32.
    """

    width: int = 1
    """Columns that are coded jointly."""
    refit_width: int | None = None
    """Columns that ``refit`` fits together just before the first of them is rounded; None: all are fitted at the start."""

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:  # noqa: B027 - only if refit_width
        """Fit the parameters of columns ``first_column ...`` to ``values`` ``(columns, rows)``, error feedback included.

        ``importance`` ``(columns,)``: what a squared error in each column costs.
        """

    @abstractmethod
    def round(self, first: int, values: Tensor) -> Tensor:
        """Round ``values`` ``(width, rows)`` of the columns from ``first`` on; what will be decoded, of the same shape."""

    def round_all(self, weight: Tensor) -> Tensor:
        """Round a whole slab ``(rows, columns)`` to nearest; returns what will be decoded."""
        rounded = torch.empty_like(weight)
        for first in range(0, weight.shape[1], self.width):
            columns = slice(first, first + self.width)
            rounded[:, columns] = self.round(first, weight[:, columns].T.contiguous()).T
        return rounded

    @abstractmethod
    def parts(self) -> Parts:
        """The slab's stored tensors; ``Codec.join`` puts the slabs of a matrix together."""


@dataclass(frozen=True)
class Described:
    """What tables show of a scheme."""

    granularity: str
    """``tensor``, ``channel``, ``group 64``; ``-`` where nothing is scaled."""
    bits: float
    """Of one stored code, scales not counted."""


class Codec(ABC):
    """A way to store weight matrices under one ``CodecScheme``. Raises ``UserError`` for schemes that it cannot store."""

    Parameters: ClassVar[type[CodecParameters]]
    """What a recipe may choose; the constructor finds an instance in ``scheme.params``."""
    slab_rows: ClassVar[int] = 32
    """Rows of a slab are a multiple of this, unless it is the last."""

    def __init__(self, scheme: CodecScheme) -> None:
        self.scheme = scheme

    @abstractmethod
    def describe(self) -> Described:
        """What tables show of the scheme."""

    @property
    def scale_dtype_name(self) -> str | None:
        """The dtype of the stored scales, where a scheme may have another one; None for codecs of which that is not so."""
        return None

    @property
    def has_one_scale(self) -> bool:
        """Whether a whole matrix has one scale."""
        return False

    @abstractmethod
    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> Encoder:
        """An encoder for the slab ``weight`` float32 ``(rows, columns)``; see ``slab_rows``.

        ``whole`` is the whole matrix (any float dtype) for parameters that all rows share. ``refit`` allows parameters
        to be fitted during rounding.
        """

    def ideal_scales(self, weight: Tensor) -> Tensor | None:
        """About what the scales of float32 ``weight`` ``(rows, columns)`` would be if every number could be stored.

        0 where all weights under a scale are. None: the codec's scales do not depend on ``scale_dtype``.
        """
        return None

    def join(self, slabs: list[Parts]) -> Parts:
        """Parts of a matrix from those of its slabs, in order."""
        return {name: torch.cat([slab[name] for slab in slabs]) for name in slabs[0]}

    @abstractmethod
    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every part of a matrix of ``shape``; what a loader allocates and checks against."""

    def code_bits(self) -> dict[str, int]:
        """Bits of the codes that a part's words are packed from without gaps, the first code lowest; parts of which that is
        not so are left out. Whoever stores parts in fewer bytes needs to know where a code begins."""
        return {}

    @abstractmethod
    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        """The stored values, float32 ``(rows, columns)``."""

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        """Rows ``rows`` (int64 indices) of ``decode``; a codec that can should decode only those."""
        return self.decode(shape, parts)[rows]


CODECS: Registry[type[Codec]] = schemes.CODECS


def codec_of(scheme: CodecScheme) -> Codec:
    """The codec that stores weights under ``scheme``. Raises ``UserError`` for a scheme that it cannot store."""
    return CODECS.get(scheme.codec)(scheme)


def decode(weight: QuantizedWeight) -> Tensor:
    """The values that ``weight`` stores, float32 ``(rows, columns)``."""
    return codec_of(weight.scheme).decode(weight.shape, weight.parts)
