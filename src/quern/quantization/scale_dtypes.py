"""Scales that ``scale_dtype`` cannot hold: the matrix gets another dtype for its scales, of the same size.

Dividing a matrix by a large number and multiplying the next one by it leaves a model the same, so that no size of weights
is wrong in itself. float16 holds scales from 2^-24 to 65504, the smallest of them with few digits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quern.codecs.base import Codec, codec_of
from quern.core.machine.parallel import Workers, pieces

NARROW, WIDE = "float16", "bfloat16"
LEAST, GREATEST = 2.0**-20, 2.0**15
"""Smaller scales would be off by more than 1/32 in float16; larger ones may grow past its 65504 while rounding."""
ROWS = 1024
"""Rows that one worker looks at."""


def fitting(codecs: Mapping[str, Codec], weights: Mapping[str, Tensor], workers: Workers) -> dict[str, Codec]:
    """``codecs`` by module name, all with wider scales if float16 would not do for one of their ``weights``.

    All together, because loaders join the linears that share an input and then want one scheme.
    """
    if all(_holds(codec, weights[name], workers) for name, codec in codecs.items()):
        return dict(codecs)
    return {name: _widened(codec) for name, codec in codecs.items()}


def note(dtypes: Mapping[str, str]) -> list[str]:
    """What whoever quantizes should know of these changes."""
    if not dtypes:
        return []
    examples = ", ".join(sorted(dtypes)[:3]) + (" ..." if len(dtypes) > 3 else "")
    modules = "1 module stores its" if len(dtypes) == 1 else f"{len(dtypes)} modules store their"
    return [
        f"{modules} scales as {WIDE} in place of {NARROW}, in as many bytes, because of scales below {LEAST:.2g} or beyond "
        f"{GREATEST:g}, which {NARROW} cannot hold well: {examples}"
    ]


def _holds(codec: Codec, weight: Tensor, workers: Workers) -> bool:
    if codec.scale_dtype_name != NARROW:
        return True

    def slab(rows: tuple[int, int]) -> bool:
        scales = codec.ideal_scales(weight[rows[0] : rows[1]].float())
        return scales is None or not bool(((scales > GREATEST) | ((scales > 0) & (scales < LEAST))).any())

    if codec.has_one_scale:  # that scale, of the largest weight
        largest = torch.stack(
            workers.map(lambda rows: weight[rows[0] : rows[1]].abs().amax(), pieces(len(weight), ROWS))
        )
        scales = codec.ideal_scales(largest.float().amax().reshape(1, 1))
        return scales is None or LEAST <= float(scales.max()) <= GREATEST or float(scales.max()) == 0
    return all(workers.map(slab, pieces(len(weight), ROWS)))


def _widened(codec: Codec) -> Codec:
    if codec.scale_dtype_name != NARROW:
        return codec
    return codec_of(codec.scheme.with_params(scale_dtype=WIDE))
