"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, eq. 4): move the outliers of activations into the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quern.codecs.base import Codec
from quern.core.machine.parallel import Workers
from quern.core.stacking import Traits
from quern.quantization.transforms.base import FOLDED, TRANSFORMS, ChannelScaling, ChannelStatistics, Repeat

DEFAULT_STRENGTH = 0.5
TINY = 1e-5


@TRANSFORMS.add("smoothquant")
class SmoothQuant(ChannelScaling):
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for input channel j; alpha is the recipe's ``strength``."""

    traits = Traits(
        removes={
            "even columns": "gives each column a scale of its own, by which the spread of inputs moves into the weights"
        },
        acts=FOLDED,
    )

    def scales(
        self,
        targets: Sequence[Tensor],
        codecs: Sequence[Codec],
        statistics: ChannelStatistics,
        repeat: Repeat,
        workers: Workers,
    ) -> Tensor:
        alpha = DEFAULT_STRENGTH if self.settings.strength is None else self.settings.strength
        largest_weight = torch.stack([weight.float().abs().amax(0) for weight in targets]).amax(0)
        ratio = statistics.largest.clamp(min=TINY) ** alpha / largest_weight.clamp(min=TINY) ** (1 - alpha)
        return repeat.reduce(ratio)
