"""What scalings of channels look at: sizes of what linears read, from a pass of the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from quern.architectures.base import BlockSpec, Rescaling
from quern.core.machine.parallel import Workers
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.transforms.base import ChannelStatistics

SAMPLED_TOKENS = 256
"""Tokens that the search of AWQ looks at, at most."""


@dataclass
class _Sizes:
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    sample: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, inputs: Tensor, waves: int) -> None:
        if not len(inputs):
            return
        inputs = inputs.float()
        sizes = inputs.abs()
        self.total = self.total + sizes.sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, sizes.amax(0))
        self.sample.append(inputs[:: max(1, waves * len(inputs) // SAMPLED_TOKENS)].clone())
        self.tokens += len(inputs)

    def known(self) -> ChannelStatistics:
        return ChannelStatistics((self.total / self.tokens).float(), self.largest, torch.cat(self.sample))


def channel_statistics(
    block: Block, source: ActivationFile, linears: Sequence[str], workers: Workers
) -> dict[str, ChannelStatistics]:
    """Of what each of ``linears`` reads; without those that read nothing. None may read what another makes."""
    found = {name: _Sizes() for name in linears}
    waves = source.waves()
    for start, stop in waves:
        taps = block.capture(linears, source.read(start, stop), workers)
        for name, sizes in found.items():
            sizes.add(taps[name].inputs, len(waves))
    return {name: sizes.known() for name, sizes in found.items() if sizes.tokens}


def rescaled_together(spec: BlockSpec) -> Iterator[list[Rescaling]]:
    """The block's rescalings in order, those of its experts in one list: none of them changes what another looks at."""

    def key(numbered: tuple[int, Rescaling]) -> int:
        number, rescaling = numbered
        return -1 if spec.linear(rescaling.targets[0]).expert is not None else number

    for _, some in groupby(enumerate(spec.rescalings), key):
        yield [rescaling for _, rescaling in some]
