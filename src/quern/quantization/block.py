"""Rounding linears that read the same input: weights, plans and statistics in, rounded linears out. Nothing is read or
written here, and no block is run."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from quern.codecs.base import codec_of
from quern.core.errors import UserError
from quern.core.machine.parallel import Workers, pieces
from quern.core.packed import PackedLinear, QuantizedWeight
from quern.core.plan import LinearPlan
from quern.observers.base import OBSERVERS
from quern.quantization import scale_dtypes
from quern.quantization.calibration.statistics import GroupStatistics
from quern.quantization.drift_targets import shift_of
from quern.quantization.rounding.base import ROUNDINGS, SLAB
from quern.quantization.rounding.factor import Factor, UnusableHessianError, factorize
from quern.quantization.row_damping import damped
from quern.rotation.rotation import rotate, rotate_back


@dataclass(frozen=True)
class RoundedLinear:
    """A rounded linear: what is stored, what a model computes with, what it cost."""

    name: str
    plan: LinearPlan
    """As carried out: with the dtype that the scales have got."""
    weight: QuantizedWeight
    decoded: Tensor
    """The stored values as the model sees them (rotated back), ``(rows, columns)``, in the dtype that came in."""
    loss: float
    """tr(E H E^T) of the change E; H the identity where the rounding uses no Hessian."""
    relative_loss: float
    """That over tr(W H W^T)."""
    input_scale: float | None = None
    """Of static activations."""
    input_signs: Tensor | None = None
    """Packed signs of the rotation of its inputs, uint8 ``(ceil(columns / 8),)``."""
    drift_share: float | None = None
    """How much of what would make up for drift its target has, from 0 to 1; None where that was not asked for."""
    rows_left: float | None = None
    """What feedback among rows leaves of the loss of gradients that took no part; 1: there is none. None: not asked for."""

    @property
    def bits_per_weight(self) -> float:
        """Of all that is stored for it."""
        rows, columns = self.weight.shape
        extra = 0 if self.input_signs is None else self.input_signs.nbytes
        return 8 * (self.weight.stored_bytes + extra) / (rows * columns)

    @property
    def packed(self) -> PackedLinear:
        """What a format stores."""
        return PackedLinear(self.weight, self.plan.activations.mode, self.input_scale, self.input_signs)


def round_linears(
    weights: Mapping[str, Tensor],
    plans: Mapping[str, LinearPlan],
    statistics: GroupStatistics,
    workers: Workers,
    signs: Tensor | None = None,
    prefix: str = "",
    turned: bool = False,
) -> list[RoundedLinear]:
    """Round ``weights`` ``(rows, columns)`` by ``plans``, both by name, in order. ``weights`` are overwritten.

    ``signs``: packed signs of the rotation that all their inputs get; ``turned`` says that weights are rotated so already,
    as this function leaves them. A linear without statistics of its own takes those of
    the one before it that wants them factorized alike; Hessians are used up. Raises ``UserError`` for weights that cannot be
    rounded so, whose name gets ``prefix``, and ``UnusableHessianError``.
    """
    for weight in weights.values() if not turned else ():
        _turn(weight, signs, rotate, workers)
    roundings = {name: ROUNDINGS.get(plans[name].rounding.method)(plans[name].rounding) for name in weights}
    codecs = {name: codec_of(plans[name].scheme) for name in weights}
    fitted = {name: codec for name, codec in codecs.items() if not roundings[name].keeps_values}
    codecs |= scale_dtypes.fitting(fitted, weights, workers)
    factors: dict[tuple[float, bool], Factor] = {}
    rounded = []
    for name, weight in weights.items():
        plan, rounding = plans[name], roundings[name]
        with about(prefix + name):
            wanted = (plan.rounding.damping, plan.rounding.activation_order)
            if rounding.needs_hessian and name in statistics.by_linear:
                factors.pop(wanted, None)  # its memory goes first
                sweeps = any(plan.rounding.sweeps for plan in plans.values())
                factors[wanted] = factorize(statistics.by_linear[name].take_hessian(), *wanted, workers, keep=sweeps)
            factor = factors[wanted] if rounding.needs_hessian else None
            share = None
            if name in statistics.drifts:
                assert factor is not None
                shift, share = shift_of(statistics.drifts.pop(name), factor, workers)
                weight = shift.add_(weight)
            outputs, left = None, None
            if name in statistics.outputs:
                outputs, left = damped(statistics.outputs.pop(name), weight, codecs[name], workers)
            result = rounding.round(weight, codecs[name], factor, workers, outputs)
        _turn(result.decoded, signs, rotate_back, workers)
        dtype = codecs[name].scale_dtype_name
        rounded.append(
            RoundedLinear(
                name,
                plan if dtype is None else plan.with_scale_dtype(dtype),
                result.weight,
                result.decoded.to(weights[name].dtype),
                result.loss,
                result.relative_loss,
                static_scale(plan, statistics),
                signs,
                share,
                left,
            )
        )
    return rounded


Group = tuple[Mapping[str, Tensor], GroupStatistics, Tensor | None]
"""Weights, statistics of their inputs, and packed signs of the rotation of these."""


def round_groups(
    groups: Iterable[Group], plans: Mapping[str, LinearPlan], prefix: str, whole: bool, workers: Workers
) -> Iterator[tuple[Group, list[RoundedLinear] | None]]:
    """Each group, and where ``workers`` are elsewhere and are to take ``whole`` groups instead of slabs, what
    ``round_linears`` makes of a copy of it."""
    if not (whole and workers.elsewhere):
        for group in groups:
            yield group, None
        return
    taken: deque[Group] = deque()

    def noted() -> Iterator[Group]:
        for group in groups:
            taken.append(group)
            yield group

    for linears in workers.spread(_round_group, (plans, prefix), noted()):
        yield taken.popleft(), linears


def _round_group(shared: tuple[Mapping[str, LinearPlan], str], group: Group) -> list[RoundedLinear]:
    """On copies: what a piece was handed is not to be changed."""
    (plans, prefix), (weights, statistics, signs) = shared, copy.deepcopy(group)
    return round_linears(weights, plans, statistics, Workers(1), signs, prefix)


@contextmanager
def about(module: str) -> Iterator[None]:
    """Whatever cannot be rounded is refused by its name."""
    try:
        yield
    except UnusableHessianError as error:
        raise UnusableHessianError(f"{module}: {error.message}") from error
    except UserError as error:
        raise UserError(f"{module}: {error.message}") from error


def turn_back(weight: Tensor, signs: Tensor | None, workers: Workers) -> None:
    """Undo in place what ``round_linears`` makes of a weight before it rounds it."""
    _turn(weight, signs, rotate_back, workers)


def static_scale(plan: LinearPlan, statistics: GroupStatistics) -> float | None:
    """The scale of static activations; None for others."""
    if plan.activations.mode != "static" or statistics.histogram is None:
        return None
    return statistics.histogram.scale(OBSERVERS.get(plan.activations.observer)())


def _turn(weight: Tensor, signs: Tensor | None, turn: Callable[[Tensor, Tensor], Tensor], workers: Workers) -> None:
    """Rotate the rows of ``weight`` in place, if they are rotated at all."""
    if signs is None:
        return

    def piece(rows: tuple[int, int]) -> None:
        weight[rows[0] : rows[1]] = turn(weight[rows[0] : rows[1]], signs)

    workers.map(piece, pieces(len(weight), SLAB))
