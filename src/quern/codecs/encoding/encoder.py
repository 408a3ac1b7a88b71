"""Encoders: what rounds the columns of a weight onto a codec's values, whatever order they come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

Parts = dict[str, Tensor]
"""The stored tensors of one matrix (or slab of rows), by name."""


class NativeColumns(Protocol):
    """Loops over columns; ``quern._native.Columns`` says what is given."""

    def feed_forward(
        self,
        places: NDArray[Any],
        first: int,
        last: int,
        inside: NDArray[Any],
        original: NDArray[Any],
        target: NDArray[Any],
        done: NDArray[Any],
        rounded: NDArray[Any],
    ) -> None:
        """Round each with what those of the block before it got wrong."""

    def sweep(
        self,
        places: NDArray[Any],
        first: int,
        last: int,
        hessian: NDArray[Any],
        rounded: NDArray[Any],
        residual: NDArray[Any],
    ) -> None:
        """Round each anew, with all others as they are."""


class Encoder(ABC):
    """Rounds the columns of one slab of rows and remembers the codes.

    Columns come in tuples of ``width``, of which the last may be shorter. Tuples may come in any order; one that comes again
    is rounded anew. Values are float32.
    """

    width: int = 1
    """Columns that are coded jointly."""
    refit_width: int | None = None
    """Columns that ``refit`` fits together just before the first of them is rounded; None: all are fitted at the start."""
    refine_width: int | None = None
    """Columns of those that ``refit`` has fitted whose parameters ``refine`` fits once more just before the first of them is
    rounded, as far as the others leave room; None: they stay."""
    rescale_width: int | None = None
    """Columns of a row whose scale ``rescale`` can change once they are rounded; None: scales stay as they are."""
    step_width: int | None = None
    """Columns of a row that share whole numbers for which ``neighbours`` are known once they are rounded; None: none are."""
    heeds_metric: bool = False
    """Whether ``round_within`` looks at its metric, and never leaves a tuple worse than it was, which sweeps need."""

    def weigh(self, importance: Tensor) -> None:  # noqa: B027 - only if parameters are fitted to whole rows
        """Say what squared errors in each column ``(columns,)`` will cost; before the first column is rounded, if at all."""

    def refit(self, first_column: int, values: Tensor, importance: Tensor) -> None:  # noqa: B027 - only if refit_width
        """Fit the parameters of columns ``first_column ...`` to ``values`` ``(columns, rows)``, error feedback included.

        ``importance`` ``(columns,)``: what a squared error in each column costs.
        """

    def refine(self, first_column: int, values: Tensor, importance: Tensor) -> None:  # noqa: B027 - only if refine_width
        """Fit what columns ``first_column ...`` have of their own, as ``refit`` fits all. Only if ``refine_width``."""

    def rescale(self, first_column: int, factor: Tensor) -> Tensor:
        """Multiply the scales of columns ``first_column ...`` by ``factor`` ``(rows,)``, as well as they can be stored; what
        they were multiplied by, and with them all that these columns decode to. Only if ``rescale_width``."""
        raise NotImplementedError

    def neighbours(self, first_column: int) -> Tensor:
        """What columns ``first_column ...`` would decode to with whole numbers near theirs, ``(choices, columns, rows)``."""
        raise NotImplementedError

    def adopt(self, first_column: int, choice: Tensor) -> None:
        """Take the whole numbers of these neighbours, int64 ``(rows,)``; -1: what is there stays."""
        raise NotImplementedError

    def native_columns(self) -> NativeColumns | None:
        """What rounds columns natively into this encoder's own codes, with its scales as they are whenever that is called;
        None: only ``round`` does."""
        return None

    @abstractmethod
    def round(self, first: int, values: Tensor) -> Tensor:
        """Round ``values`` ``(width, rows)`` of the columns from ``first`` on; what will be decoded, of the same shape."""

    def round_within(self, first: int, values: Tensor, metric: Tensor) -> Tensor:
        """``round`` a tuple whose errors e ``(columns,)`` cost e M e^T, M = ``metric`` ``(columns, columns)``; as if all
        counted alike unless ``heeds_metric``."""
        return self.round(first, values)

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
