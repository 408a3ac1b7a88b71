"""Codecs: which values can be stored, and how they lie in bits.

A codec knows nothing of error feedback, and a rounding nothing of codes: rounding asks an ``Encoder`` to "round this
column" and feeds the error forward, whatever the codec is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from quern.core.packed import QuantizedWeight
from quern.core.recipe import WeightScheme
from quern.core.registry import Registry

Parts = dict[str, Tensor]
TINY = 2.0**-24
"""Scale of weights that are all zero, and least float16 scale: the smallest float16 above zero."""


def least_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale``, but never so small that ``dtype`` would make nothing of it; ``TINY`` for no scale at all."""
    if dtype == torch.float16:
        return scale.clamp(min=TINY)
    return torch.where(scale == 0, TINY, scale.clamp(min=torch.finfo(dtype).tiny))


class Encoder(ABC):
    """Rounds the columns of one slab of rows and remembers the codes.

    Columns may come in any order, each exactly once. Values are float32.
    """

    refit_width: int | None = None
    """Columns that ``refit`` fits together just before the first of them is rounded; None: all are fitted at the start."""

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:  # noqa: B027 - only if refit_width
        """Fit the parameters of columns ``first_column ...`` to ``values`` ``(columns, rows)``, error feedback included.

        ``importance`` ``(columns,)``: what a squared error in each column costs.
        """

    @abstractmethod
    def round(self, column: int, values: Tensor) -> Tensor:
        """Round ``values`` ``(rows,)`` of one column; returns the stored values ``(rows,)`` as they will be decoded."""

    def round_all(self, weight: Tensor) -> Tensor:
        """Round a whole slab ``(rows, columns)`` to nearest; returns what will be decoded."""
        rounded = torch.empty_like(weight)
        for column in range(weight.shape[1]):
            rounded[:, column] = self.round(column, weight[:, column])
        return rounded

    @abstractmethod
    def parts(self) -> Parts:
        """The slab's stored tensors; ``Codec.join`` puts the slabs of a matrix together."""


class Codec(ABC):
    """A way to store weight matrices under one ``WeightScheme``. Raises ``UserError`` for schemes that it cannot store."""

    slab_rows: ClassVar[int] = 32
    """Rows of a slab are a multiple of this, unless it is the last."""

    def __init__(self, scheme: WeightScheme) -> None:
        self.scheme = scheme

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

    @abstractmethod
    def decode(self, shape: tuple[int, int], parts: Parts) -> Tensor:
        """The stored values, float32 ``(rows, columns)``."""

    def decode_rows(self, shape: tuple[int, int], parts: Parts, rows: Tensor) -> Tensor:
        """Rows ``rows`` (int64 indices) of ``decode``; a codec that can should decode only those."""
        return self.decode(shape, parts)[rows]


CODECS: Registry[type[Codec]] = Registry("codec", "quern.codecs")


def decode(weight: QuantizedWeight) -> Tensor:
    """The values that ``weight`` stores, float32 ``(rows, columns)``."""
    return CODECS.get(weight.scheme.codec)(weight.scheme).decode(weight.shape, weight.parts)
