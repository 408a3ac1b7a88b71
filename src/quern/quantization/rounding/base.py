"""Roundings: which stored value each weight becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from quern.codecs.base import Codec, Parts
from quern.core import recipe_parts
from quern.core.machine.parallel import Workers, pieces
from quern.core.packed import QuantizedWeight
from quern.core.recipe_parts import Rounding as Settings
from quern.core.registry import Registry
from quern.core.stacking import NO_TRAITS, Traits
from quern.quantization.rounding.factor import Factor, quadratic_size
from quern.quantization.rounding.row_feedback import SETS, OutputHessian, RowFeedback

SLAB = 1024
"""Rows that one worker rounds at a time: a multiple of 32, because codecs pack down the rows; keeps a block in the cache."""

PIECE = 256
"""About as many rows of a set, of those that are rounded one after the other, are rounded by one worker."""


@dataclass(frozen=True)
class RoundedSlab:
    """Some rows of a matrix, rounded."""

    parts: Parts
    decoded: Tensor
    """The stored values, float32 ``(rows, columns)``."""
    loss: float
    """tr(E H E^T); E is the change, H the identity where the rounding uses no Hessian."""
    size: float
    """tr(W H W^T) of the weights W that came in."""


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix, what an engine will see of it, and what rounding cost."""

    weight: QuantizedWeight
    decoded: Tensor
    """The stored values, ``(rows, columns)``, in the dtype of the weight that came in."""
    loss: float
    """tr(E H E^T) of all rows."""
    relative_loss: float
    """That over tr(W H W^T); 0 where the weight is."""


class Rounding(ABC):
    """A way to round. ``settings`` come from the recipe."""

    needs_hessian: bool
    keeps_values: ClassVar[bool] = False
    """Whether weights keep exactly the values that they have, or are refused: nothing may change them before, and the codec
    has to find codes for them (``Codec.takes_values``)."""
    traits: ClassVar[Traits] = NO_TRAITS
    """What it does to others that it is stacked with."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def round_slab(
        self, slab: Tensor, whole: Tensor, codec: Codec, factor: Factor | None, native: bool = False
    ) -> RoundedSlab:
        """Round float32 ``slab`` ``(rows, columns)``, rows of ``whole``.

        ``native``: error feedback may go through native loops, whose sums have another order (``columns``).
        """

    def slab_height(self, rows: int, codec: Codec) -> int:
        """Rows of a slab of a matrix of ``rows``."""
        return SLAB

    def round(
        self,
        weight: Tensor,
        codec: Codec,
        factor: Factor | None,
        workers: Workers,
        outputs: OutputHessian | None = None,
    ) -> Rounded:
        """Round ``weight`` ``(rows, columns)``.

        Rows are independent, so slabs of them go to the workers. With ``outputs`` sets of rows follow one another and make
        up for those before them.
        """
        rows, columns = weight.shape
        if outputs is None:
            where = pieces(rows, self.slab_height(rows, codec))
            slabs = workers.spread(_slab, (self, codec, weight, factor), where)
            decoded = torch.cat([slab.decoded for slab in slabs])
            join = codec.join
        else:
            sets = codec.row_sets(rows, SETS)
            order = torch.cat([some for some, _ in sets])
            decoded = torch.empty_like(weight)
            feedback = RowFeedback(outputs, order, columns, workers)
            slabs = self._in_turn(weight, sets, factor, feedback, workers, decoded)
            join = partial(codec.join_sets, rows)
        parts = [{name: part.cpu() for name, part in slab.parts.items()} for slab in slabs]
        packed = QuantizedWeight(codec.scheme, (rows, columns), join(parts))
        loss, size = sum(slab.loss for slab in slabs), sum(slab.size for slab in slabs)
        return Rounded(packed, decoded, loss, loss / size if size else 0.0)

    def _in_turn(
        self,
        weight: Tensor,
        sets: Sequence[tuple[Tensor, Codec]],
        factor: Factor | None,
        feedback: RowFeedback,
        workers: Workers,
        decoded: Tensor,
    ) -> list[RoundedSlab]:
        """Sets of rows, each rounded towards what makes up for those before it; losses are by the weights themselves.

        What they decode to is written into ``decoded`` ``(rows, columns)``, and none of the slabs has it.
        """
        assert factor is not None, "feedback among rows goes with feedback among columns"
        slabs, lent = [], workers.lend((self, weight, factor))
        for some, codec in sets:
            rows = weight[some].float()
            target = rows + feedback.due(len(rows))
            height = -(-PIECE // codec.slab_rows) * codec.slab_rows

            found = workers.spread(_piece, lent, [(codec, target[slice(*part)]) for part in pieces(len(rows), height)])
            stored = torch.cat([slab.decoded for slab in found])
            decoded[some] = stored.to(decoded.dtype)
            error = rows - stored
            feedback.got_wrong(error)
            # Losses are estimated for the whole set; they are those of its first piece then.
            loss, size = quadratic_size(error, factor), quadratic_size(rows, factor)
            for position, slab in enumerate(found):
                first = position == 0
                slab = replace(
                    slab, decoded=stored.new_empty(0), loss=loss if first else 0.0, size=size if first else 0.0
                )
                slabs.append(slab)
        return slabs


def _slab(shared: tuple[Rounding, Codec, Tensor, Factor | None], part: tuple[int, int]) -> RoundedSlab:
    """Some rows of a matrix."""
    rounding, codec, weight, factor = shared
    slab = rounding.round_slab(weight[slice(*part)].float(), weight, codec, factor)
    return replace(slab, decoded=slab.decoded.to(weight.dtype))


def _piece(shared: tuple[Rounding, Tensor, Factor], item: tuple[Codec, Tensor]) -> RoundedSlab:
    """Some rows of a set, towards what makes up for others."""
    (rounding, weight, factor), (codec, target) = shared, item
    return rounding.round_slab(target, weight, codec, factor, native=True)


ROUNDINGS: Registry[type[Rounding]] = recipe_parts.ROUNDINGS
