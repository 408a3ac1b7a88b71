"""Codes for values that lie on a uniform grid already: every value is a whole number of steps, and which step is not known.

All values of a set that shares a scale are v = s d with whole numbers d of a few bits. Let u be the least magnitude but zero
among them, u = s m. Then v m / u are the numbers d, so that trying m = 1, 2, ... finds them: with a wrong m some of them are
off a whole number by at least 1 / |d| > 1/256, with the right one by rounding alone. The first m that fits is that of the
coarsest grid; where its step cannot be stored (of a set with few distinct values) a finer one may be. The span of the
numbers grows with m, so that a set without a grid is known for that as soon as they do not fit the codes, mostly at once.

A scale of float16 or bfloat16 has at most eleven significant bits and a number eight, so float32 holds their product and
u / m is the scale. One of float32 cannot be divided out like that, because the products were rounded: any scale will do that
lies, for each value, between the two ends of what rounds to it, divided by its number.

Whatever is found is multiplied out and compared before it is believed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quern.codecs.base import least_scale

VALUES_AT_ONCE = 1 << 18
"""Values that are looked at together: what is made on the way stays in the caches, and a matrix without a grid ends soon."""
WHOLE = 2.0**-10
"""What is off a whole number by less is one, rounded: 255 times some 2^-24 lie far below, 1/256 above."""


class Exact(NamedTuple):
    """Values as codes of a uniform grid, value = (code - zero) x scale."""

    codes: Tensor
    """uint8, of the shape of the values."""
    scale: Tensor
    """float32 ``(sets,)``; numbers of the dtype that was asked for. A symmetric grid that has to be upside down has negative
    ones."""
    zero: Tensor
    """Whole numbers in float32 ``(sets,)``."""


def exact_codes(values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Exact | None:
    """Codes of ``bits`` with scales of ``dtype`` that stand for exactly ``values`` float32 ``(sets, width)``; None if there
    are none for some set.

    Every set has a scale of its own. ``symmetric``: the zero point is 2^(bits-1); otherwise it is any code. Negative zeros
    count as zeros.
    """
    sets, width = values.shape
    found: list[Exact | None] = []
    step = max(1, VALUES_AT_ONCE // max(width, 1))
    for first in range(0, sets, step):
        some = values[first : first + step]
        found.append((_few if width <= VALUES_AT_ONCE else _one)(some, bits, symmetric, dtype))
        if found[-1] is None:
            return None
    return Exact(*(torch.cat(parts) for parts in zip(*filter(None, found), strict=True)))


def _one(values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Exact | None:
    """Of one large set ``(1, width)``, which has few distinct values if it has a grid."""
    pieces = torch.split(values[0], VALUES_AT_ONCE)
    distinct = values.new_empty(0)
    for piece in pieces:
        distinct = torch.unique(torch.cat([distinct, torch.unique(piece)]))
        if len(distinct) > 1 << bits:
            return None
    exact = _few(distinct[None], bits, symmetric, dtype)
    if exact is None:
        return None
    codes = torch.cat([exact.codes[0, torch.searchsorted(distinct, piece)] for piece in pieces])
    return exact._replace(codes=codes[None])


def _few(values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Exact | None:
    sets, levels = len(values), (1 << bits) - 1
    numbers = torch.zeros_like(values)
    scale = least_scale(values.new_zeros(sets), dtype)
    least = torch.where(values == 0, torch.inf, values.abs()).amin(1)
    pending = least.isfinite().nonzero()[:, 0]
    middle = (levels + 1) // 2
    for multiple in range(1, 1 + (middle if symmetric else levels)):
        if not len(pending):
            break
        rest, unit = (values, least) if len(pending) == sets else (values[pending], least[pending])
        steps = (rest / unit[:, None]).mul_(multiple)
        whole = steps.round()
        low, high = whole.amin(1), whole.amax(1)
        upside_down = (
            (low < -middle) | (high > levels - middle) if symmetric else torch.zeros_like(low, dtype=torch.bool)
        )
        if not bool(_fit(low, high, upside_down, levels, symmetric).all()):
            return None
        size = _float32_scale(rest, whole) if dtype == torch.float32 else (unit.double() / multiple).to(dtype).float()
        right = ((steps - whole).abs_().amax(1) < WHOLE) & (whole * size[:, None] == rest).all(1)
        done = pending[right]
        sign = 1 - 2 * upside_down[right].to(values.dtype)
        numbers[done], scale[done] = whole[right] * sign[:, None], size[right] * sign
        pending = pending[~right]
    if len(pending):
        return None
    zero = torch.full_like(scale, middle) if symmetric else numbers.amin(1).clamp_(max=0).neg_()
    return Exact((numbers + zero[:, None]).to(torch.uint8), scale, zero)


def _fit(low: Tensor, high: Tensor, upside_down: Tensor, levels: int, symmetric: bool) -> Tensor:
    """Whether the numbers from ``low`` to ``high`` of each set are codes less a zero point."""
    if not symmetric:
        return high.clamp(min=0) - low.clamp(max=0) <= levels
    middle = (levels + 1) // 2
    low, high = torch.where(upside_down, -high, low), torch.where(upside_down, -low, high)
    return (low >= -middle) & (high <= levels - middle)


def _float32_scale(values: Tensor, whole: Tensor) -> Tensor:
    """The float32 nearest to the middle of all scales by which ``whole`` numbers round to ``values``; if any of those is a
    float32, this one is. Float32 ``(sets,)``."""
    sizes, number = values.abs(), whole.abs().double()
    infinity = torch.full_like(sizes, torch.inf)
    ends = [
        (sizes.double() + torch.nextafter(sizes, to).double()) / 2 / number
        for to in (torch.zeros_like(sizes), infinity)
    ]
    low = torch.where(number == 0, -torch.inf, ends[0]).amax(1)
    high = torch.where(number == 0, torch.inf, ends[1]).amin(1)
    return ((low + high) / 2).float()
