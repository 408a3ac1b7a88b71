"""Codes for values that lie on a grid already, whose step is not known.

On a uniform grid all values of a set that shares a scale are v = s d with whole numbers d of a few bits. Let u be the
least magnitude but zero among them, u = s m. Then v m / u are the numbers d, so that trying m = 1, 2, ... finds them: with
a wrong m some of them are off a whole number by at least 1 / |d| > 1/256, with the right one by rounding alone. The first m
that fits is that of the coarsest grid; where its step cannot be stored (of a set with few distinct values) a finer one may
be. The span of the numbers grows with m, so that a set without a grid is known for that as soon as they do not fit the
codes, mostly at once.

A scale of float16 or bfloat16 has at most eleven significant bits and a number eight, so float32 holds their product and
u / m is the scale. One of float32 cannot be divided out like that, because the products were rounded: any scale will do that
lies, for each value, between the two ends of what rounds to it, divided by its number.

Numbers of eight floating bits are tried from the greatest magnitude: it is one of the 126 or so that there are, mostly the
largest, and then all others are known.

Whatever is found is multiplied out and compared before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    """Whole numbers in float32 ``(sets,)``; zeros where there are no zero points."""


def exact_codes(values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Exact | None:
    """Codes of ``bits`` with scales of ``dtype`` that stand for exactly ``values`` float32 ``(sets, width)``; None if there
    are none for some set.

    Every set has a scale of its own. ``symmetric``: the zero point is 2^(bits-1); otherwise it is any code. Negative zeros
    count as zeros.
    """
    return _in_pieces(values, partial(_integers, bits=bits, symmetric=symmetric, dtype=dtype), 1 << bits)


def exact_floats(values: Tensor, number: torch.dtype, dtype: torch.dtype) -> Exact | None:
    """The same with floating-point numbers of the dtype ``number`` of eight bits, whose bytes are the codes, and no zero
    points."""
    return _in_pieces(values, partial(_floats, number=number, dtype=dtype), 1 << 8)


def _in_pieces(values: Tensor, find: Callable[[Tensor], Exact | None], codes: int) -> Exact | None:
    """What ``find`` makes of some sets after the others, and of a large one by its distinct values, if they are so few."""
    sets, width = values.shape
    found: list[Exact | None] = []
    step = max(1, VALUES_AT_ONCE // max(width, 1))
    for first in range(0, sets, step):
        some = values[first : first + step]
        found.append(find(some) if width <= VALUES_AT_ONCE else _by_distinct(some, find, codes))
        if found[-1] is None:
            return None
    return Exact(*(torch.cat(parts) for parts in zip(*filter(None, found), strict=True)))


def _by_distinct(values: Tensor, find: Callable[[Tensor], Exact | None], codes: int) -> Exact | None:
    """Of one set ``(1, width)``."""
    pieces = torch.split(values[0], VALUES_AT_ONCE)
    distinct = values.new_empty(0)
    for piece in pieces:
        distinct = torch.unique(torch.cat([distinct, torch.unique(piece)]))
        if len(distinct) > codes:
            return None
    exact = find(distinct[None])
    if exact is None:
        return None
    return exact._replace(
        codes=torch.cat([exact.codes[0, torch.searchsorted(distinct, piece)] for piece in pieces])[None]
    )


def _integers(values: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Exact | None:
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


def _floats(values: Tensor, number: torch.dtype, dtype: torch.dtype) -> Exact | None:
    """The greatest magnitude is one number or another, the largest first; each says what the others are then."""
    positive = torch.arange(1, 128, dtype=torch.uint8).view(number).float()
    numbers = torch.zeros_like(values)
    scale = least_scale(values.new_zeros(len(values)), dtype)
    greatest = values.abs().amax(1)
    pending = greatest.nonzero()[:, 0]
    for top in sorted(positive[positive.isfinite()].tolist(), reverse=True):
        if not len(pending):
            break
        rest, step = values[pending], greatest[pending].double() / top
        near = (rest / step.float()[:, None]).clamp_(-top, top).to(number).float()
        size = _float32_scale(rest, near) if dtype == torch.float32 else step.to(dtype).float()
        right = (near * size[:, None] == rest).all(1)
        numbers[pending[right]], scale[pending[right]] = near[right], size[right]
        pending = pending[~right]
    if len(pending):
        return None
    return Exact(numbers.to(number).view(torch.uint8), scale, torch.zeros_like(scale))


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
