"""AWQ (Lin et al. 2024, arXiv 2306.00978, eq. 4-5): protect the channels that activations make salient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quern.codecs.base import Codec
from quern.core.errors import UserError
from quern.core.machine.parallel import Workers, pieces
from quern.core.recipe_parts import Transform as Settings
from quern.core.stacking import Traits
from quern.quantization.transforms.base import (
    FOLDED,
    TRANSFORMS,
    ChannelScaling,
    ChannelStatistics,
    Repeat,
    power_of_two,
)

STEPS = 20
SLAB = 1024


@TRANSFORMS.add("awq")
class Awq(ChannelScaling):
    """s_j = mean|X_j|^a, the exponent a in [0, 1] searched for the least output error of rounding to nearest."""

    traits = Traits(acts=FOLDED)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.strength is not None:
            raise UserError("transform awq searches its exponent and takes no strength; remove the key")

    def scales(
        self,
        targets: Sequence[Tensor],
        codecs: Sequence[Codec],
        statistics: ChannelStatistics,
        repeat: Repeat,
        workers: Workers,
    ) -> Tensor:
        size = repeat.reduce(statistics.mean_size)
        size = size / size[size > 0].log().mean().exp() if bool((size > 0).any()) else size
        best, best_error = torch.ones_like(size), float("inf")
        for step in range(STEPS):
            scales = power_of_two(size ** (step / STEPS))
            wide = repeat(scales)
            error = sum(
                _output_error(weight, codec, wide, statistics.sample, workers) for weight, codec in zip(targets, codecs)
            )
            if error < best_error:
                best, best_error = scales, error
        return best


def _output_error(weight: Tensor, codec: Codec, scales: Tensor, sample: Tensor, workers: Workers) -> float:
    """|(Q(W s) / s - W) X|^2 over the sampled tokens."""

    def slab(rows: tuple[int, int]) -> float:
        scaled = weight[rows[0] : rows[1]].float() * scales
        change = codec.encoder(scaled, scaled, refit=False).round_all(scaled).sub_(scaled).div_(scales)
        return float((sample @ change.T).square_().sum(dtype=torch.float64))

    return sum(workers.map(slab, pieces(weight.shape[0], SLAB)))
