"""Codecs: which values can be stored, and how they lie in bits.

A codec knows nothing of error feedback, and a rounding nothing of codes: rounding asks an ``Encoder`` to "round this
column" and feeds the error forward, whatever the codec is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from quern.codecs.encoding.encoder import Encoder as Encoder
from quern.codecs.encoding.encoder import NativeColumns as NativeColumns
from quern.codecs.encoding.encoder import Parts as Parts
from quern.codecs.packing.floats import FloatForm
from quern.codecs.packing.ggml import GgmlBlocks, GgmlForm
from quern.codecs.packing.nbits import NBitsBlocks, NBitsForm
from quern.codecs.trainable.base import Fixed, RowFactors, Trainable
from quern.core import scheme as schemes
from quern.core.errors import UserError
from quern.core.packed import QuantizedWeight
from quern.core.registry import Registry
from quern.core.scheme import CodecParameters, CodecScheme
from quern.core.stacking import NO_TRAITS, Traits

GROUPED = ("group", "block")
"""Granularities that have a ``group_size``."""
MOST_BLOCK_ROWS = 1024
"""Rows that are rounded together, of which blocks are a part."""
TINY = 2.0**-24
"""Scale of weights that are all zero, and least float16 scale: the smallest float16 above zero."""


def least_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale``, but never so small that ``dtype`` would make nothing of it; ``TINY`` for no scale at all."""
    if dtype == torch.float16:
        return scale.clamp(min=TINY)
    return torch.where(scale == 0, TINY, scale.clamp(min=torch.finfo(dtype).tiny))


def scales_overflow(weights: Tensor, scale_dtype: str) -> UserError:
    """What to raise where scales of ``weights`` are beyond what ``scale_dtype`` holds."""
    larger = "; bfloat16 and float32 hold larger scales" if scale_dtype == "float16" else ""
    return UserError(
        f"weights up to {float(weights.abs().max()):.3g} are too large for scales in scale_dtype {scale_dtype}. Check the "
        f"checkpoint{larger}"
    )


def nearest_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of ``dtype`` next to float32 ``scale``, in float32: of its sign, finite, and zero only for zero."""
    size = least_scale(scale.abs(), dtype).clamp(max=torch.finfo(dtype).max).to(dtype).float()
    return torch.where(scale == 0, 0.0, size * scale.sign())


class ScaledParameters(CodecParameters):
    """What codecs with scales share."""

    bits: Annotated[int, Field(ge=1, le=8)] = 4
    """Bits of one stored code."""
    symmetric: bool = True
    """Symmetric grids have their zero in the middle; asymmetric ones store a zero point for each scale."""
    granularity: Literal["tensor", "channel", "group", "block"] = "group"
    """Who shares a scale: the tensor, one output channel (row), ``group_size`` inputs of a row, or ``group_size`` rows and
    inputs."""
    group_size: Annotated[int, Field(ge=1)] | None = 128
    """Inputs that share a scale under ``group`` (the last group of a row may be shorter), and rows too under ``block``;
    otherwise null."""
    observer: str = "mean_squared_error"
    """Name of the observer that picks the range that the scale covers."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """How scales are stored."""

    @model_validator(mode="before")
    @classmethod
    def _no_group_without_granularity(cls, values: Any) -> Any:
        usual = cls.model_fields["granularity"].default
        if isinstance(values, dict) and values.get("granularity", usual) not in GROUPED:
            return {"group_size": None, **values}
        return values

    @model_validator(mode="after")
    def _check_group(self) -> ScaledParameters:
        if (self.granularity in GROUPED) != (self.group_size is not None):
            raise ValueError("group_size goes with granularity: group or block, and only with these")
        if self.granularity == "block" and (MOST_BLOCK_ROWS % (self.group_size or 1) or not self.symmetric):
            raise ValueError(f"blocks are symmetric, and their group_size divides {MOST_BLOCK_ROWS}")
        return self


@dataclass(frozen=True)
class Described:
    """What tables show of a scheme."""

    granularity: str
    """``tensor``, ``channel``, ``group 64``; ``-`` where nothing is scaled."""
    bits: float
    """Of one stored code, scales not counted."""


@dataclass(frozen=True)
class KernelForm:
    """How native kernels read a matrix: which kind of weights it is, and what they are given (``quern._native.Matrix``)."""

    kind: str
    arrays: Mapping[str, str]
    """The part that each keyword takes."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords."""
    group: int | None = None
    """Columns that share a scale; None: kinds that know no groups."""
    scale_rows: int = 1
    """Rows that share their scales; 0: all do."""
    factor: tuple[str, float] | None = None
    """``scale_factor`` is the number in this part times so much."""
    exact_inputs: bool = False
    """Whether the kernel multiplies inputs as they are, and not in int8."""
    decoded: bool = False
    """Whether ``codes`` are to be ``Codec.integers``, because no kernel unpacks such codes."""
    fine: bool = False
    """Whether int8 inputs would lose more than the weights did."""
    blocks: bool = False
    """Whether ``codes`` are to be ``Codec.ggml_blocks``, in which everything lies together."""


class Codec(ABC):
    """A way to store weight matrices under one ``CodecScheme``. Raises ``UserError`` for schemes that it cannot store."""

    Parameters: ClassVar[type[CodecParameters]]
    """What a recipe may choose; the constructor finds an instance in ``scheme.params``."""
    technique: ClassVar[str] = "other"
    """What the literature calls it; recipes are listed by it."""
    takes_values: ClassVar[bool] = False
    """Whether ``exact_parts`` finds parts at all."""
    trains_codes: ClassVar[bool] = False
    """Whether ``trainable`` takes latent weights."""
    slab_rows: int = 32
    """Rows of a slab are a multiple of this, unless it is the last."""

    def __init__(self, scheme: CodecScheme) -> None:
        self.scheme = scheme

    @property
    def traits(self) -> Traits:
        """What it wants, under its scheme, of the weights that come to it."""
        return NO_TRAITS

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

    def fitting(self, shape: tuple[int, int]) -> CodecScheme:
        """The scheme under which a matrix of ``shape`` is stored: this one, or what stands in for it where its rows do not
        fit."""
        return self.scheme

    @abstractmethod
    def encoder(self, weight: Tensor, whole: Tensor, refit: bool) -> Encoder:
        """An encoder for the slab ``weight`` float32 ``(rows, columns)``; see ``slab_rows``.

        ``whole`` is the whole matrix (any float dtype) for parameters that all rows share. ``refit`` allows parameters
        to be fitted during rounding.
        """

    def exact_parts(self, weight: Tensor) -> Parts | None:
        """Parts that decode to exactly the values of the slab ``weight`` float32 ``(rows, columns)``; None if no parts do,
        or if nobody knows how to find them (``takes_values``).

        Where ``has_one_scale``, the slab is the whole matrix. Zeros are all alike, whatever their sign.
        """
        return None

    def exact_scheme(self, weight: Tensor) -> CodecScheme | None:
        """A scheme of this codec, with scales of channels or groups, that has exactly the values of some rows float32
        ``(rows, columns)``: that of the largest groups, and of these the fewest bits. None if none has."""
        return None

    def ideal_scales(self, weight: Tensor) -> Tensor | None:
        """About what the scales of float32 ``weight`` ``(rows, columns)`` would be if every number could be stored.

        0 where all weights under a scale are. None: the codec's scales do not depend on ``scale_dtype``.
        """
        return None

    def kernel(self, shape: tuple[int, int]) -> KernelForm | str:
        """How native kernels read a matrix of ``shape``, or a clause that says why they cannot."""
        return f"it has no kernel for the codec {self.scheme.codec}"

    def ggml(self, shape: tuple[int, int]) -> GgmlForm | str:
        """How a matrix of ``shape`` lies in a GGUF file, or a clause that says why it cannot."""
        return f"no type of ggml has the values of codec {self.scheme.codec}"

    def ggml_blocks(self, shape: tuple[int, int], parts: Parts) -> GgmlBlocks:
        """The matrix in the blocks of the type that ``ggml`` names. Raises ``UserError`` for scales beyond float16."""
        raise NotImplementedError(self.scheme.codec)

    def floats(self) -> FloatForm | str:
        """How matrices lie in compressed-tensors as floating-point codes, or a clause that says why they cannot."""
        return f"it stores integers and floating-point codes, not codec {self.scheme.codec!r}; set codec: integer"

    def float_tensors(self, shape: tuple[int, int], parts: Parts) -> dict[str, Tensor]:
        """The matrix as ``floats`` says, by the last parts of its tensors' names."""
        raise NotImplementedError(self.scheme.codec)

    def nbits(self, shape: tuple[int, int]) -> NBitsForm | str:
        """How a matrix of ``shape`` lies in ONNX Runtime's blocks of integers, or a clause that says why it cannot."""
        return f"ONNX Runtime has no operator for the values of codec {self.scheme.codec}; use codec integer"

    def nbits_blocks(self, shape: tuple[int, int], parts: Parts) -> NBitsBlocks:
        """The matrix in the blocks that ``nbits`` describes."""
        raise NotImplementedError(self.scheme.codec)

    def integers(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        """The stored numbers before scales multiply them, int8 ``(rows, columns)``; for a ``KernelForm`` that wants them."""
        raise NotImplementedError(self.scheme.codec)

    def rows_of_factor(self, rows: int) -> int:
        """Rows of a matrix of ``rows`` that get one factor in ``fold``, those next to each other."""
        return 1

    def fold(self, parts: Parts, factors: Tensor) -> Parts | None:
        """The parts of a matrix whose rows are multiplied by ``factors`` float32 ``(sets of rows,)`` (``rows_of_factor``).

        As nearly as its scales can be stored, codes as they are; factors of 1 change no bit. None if no scale can take them.
        """
        return None

    def trainable(self, shape: tuple[int, int], parts: Parts, weight: Tensor | None) -> Trainable:
        """What can be trained of a matrix of ``shape`` that is stored as ``parts``, without another byte.

        ``weight`` float32 ``shape``: what latent weights begin at, where that rounds to what is stored; None: codes stay.
        Codecs for which ``trains_codes`` is not set get no ``weight``.
        """
        rows = shape[0]
        factors = torch.ones(-(-rows // self.rows_of_factor(rows)))
        return (Fixed if self.fold(parts, factors) is None else RowFactors)(self, shape, parts)

    def join(self, slabs: list[Parts]) -> Parts:
        """Parts of a matrix from those of its slabs, in order."""
        return {name: torch.cat([slab[name] for slab in slabs]) for name in slabs[0]}

    def row_sets(self, rows: int, most: int) -> list[tuple[Tensor, Codec]]:
        """About ``most`` sets of rows of a matrix that can be rounded one after the other, at most: int64 indices, and the
        codec that rounds them as a slab of their own. ``join_sets`` puts their parts together."""
        height = -(-rows // (most * self.slab_rows)) * self.slab_rows
        return [(each, self) for each in torch.split(torch.arange(rows), height)]

    def join_sets(self, rows: int, parts: list[Parts]) -> Parts:
        """Parts of a matrix of ``rows`` from those of its ``row_sets``, of which there is one for each."""
        return self.join(parts)

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

    def int8_codes(self, shape: tuple[int, int], parts: Parts) -> tuple[Tensor, Tensor, int]:
        """The numbers int8 ``(rows, columns)`` that int8 activations are multiplied with, their scales float32
        ``(rows, groups)`` or ``(1, 1)``, and how many columns share one; of codecs whose parameters have no
        ``int8_obstacle``."""
        raise NotImplementedError(f"codec {self.scheme.codec} stores no int8 numbers")

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
