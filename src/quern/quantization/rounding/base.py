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
    def round_slab(self, slab: Tensor, whole: Tensor, codec: Codec, factor: Factor | None) -> RoundedSlab:
        """Round float32 ``slab`` ``(rows, columns)``, rows of ``whole``."""

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
            slabs = workers.map(lambda part: self._slab(weight[slice(*part)], weight, codec, factor), where)
            decoded = torch.cat([slab.decoded for slab in slabs])
            join = codec.join
        else:
            sets = codec.row_sets(rows, SETS)
            order = torch.cat([some for some, _ in sets])
            slabs = self._in_turn(weight, sets, factor, RowFeedback(outputs, order, workers))
            decoded = torch.empty_like(weight)
            decoded[order] = torch.cat([slab.decoded for slab in slabs])
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
    ) -> list[RoundedSlab]:
        """Sets of rows, each rounded towards what makes up for those before it; losses are by the weights themselves."""
        assert factor is not None, "feedback among rows goes with feedback among columns"
        slabs = []
        for some, codec in sets:
            rows = weight[some].float()
            slab = self.round_slab(rows + feedback.due(*rows.shape), weight, codec, factor)
            error = rows - slab.decoded
            feedback.got_wrong(error)
            loss, size = quadratic_size(error, factor), quadratic_size(rows, factor)
            slabs.append(replace(slab, decoded=slab.decoded.to(weight.dtype), loss=loss, size=size))
        return slabs

    def _slab(self, rows: Tensor, whole: Tensor, codec: Codec, factor: Factor | None) -> RoundedSlab:
        slab = self.round_slab(rows.float(), whole, codec, factor)
        return replace(slab, decoded=slab.decoded.to(rows.dtype))


ROUNDINGS: Registry[type[Rounding]] = recipe_parts.ROUNDINGS
