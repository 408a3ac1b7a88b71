"""Transforms: exact rewritings of a block before quantization.

A ``ChannelScaling`` divides the channels between two layers by s and multiplies the next layer's columns by s, along the
rescalings that an architecture declares. What the artifact stores unrounded (norms, biases, linears that the recipe
keeps) must not lose a bit by that: ``foldable`` sees to it, by powers of two where nothing finer is exact.

An ``InputRotation`` turns what linears read, when the model runs, and the rows of their weights before they are rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quern.architectures.base import Rescaling
from quern.codecs.base import Codec
from quern.core.machine.parallel import Workers
from quern.core.recipe_parts import Transform as Settings
from quern.core.registry import Registry
from quern.core.stacking import NO_TRAITS, Traits
from quern.core.text.language import translatable

LARGEST_EXPONENT = 8
"""Scales stay within 2^-8 ... 2^8, far from the ends of bfloat16 and float16."""


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of the inputs ``(tokens, channels)`` that some linears read."""

    mean_size: Tensor
    """Mean |x|, float32 ``(channels,)``."""
    largest: Tensor
    """Greatest |x|, float32 ``(channels,)``."""
    sample: Tensor
    """Evenly spaced tokens, float32 ``(sampled, channels)``."""


class Transform(ABC):  # noqa: B024 - what a transform is asked for is up to its kind
    """Something that ``transforms`` in a recipe may name; one of the kinds below."""

    traits: ClassVar[Traits] = NO_TRAITS
    """What it does to others that it is stacked with."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings


class InputRotation(Transform):
    """A rotation (``rotation/rotation.py``) of what each group of linears reads."""

    @abstractmethod
    def signs(self, columns: int, seed: int, *place: object) -> Tensor:
        """Packed signs uint8 ``(ceil(columns / 8),)`` for the group of linears that ``place`` names."""


class ChannelScaling(Transform):
    """A way to choose the channel scales of one rescaling."""

    @abstractmethod
    def scales(
        self,
        targets: Sequence[Tensor],
        codecs: Sequence[Codec],
        statistics: ChannelStatistics,
        repeat: Repeat,
        workers: Workers,
    ) -> Tensor:
        """Scales float32 ``(source channels,)``, any positive numbers; the caller makes them ``foldable``.

        ``targets`` are the weights ``(outputs, channels)`` of the linears that read the channels. ``repeat`` spreads
        source channels over target channels and ``repeat.reduce`` averages target channels for each source channel.
        """


@dataclass(frozen=True)
class Repeat:
    """How the channels of a rescaling's source feed those of its targets."""

    heads: int
    """Source heads (1 where source and target channels are the same)."""
    times: int
    """Target heads that each source head feeds."""

    @classmethod
    def of(cls, rescaling: Rescaling) -> Repeat:
        """That of a rescaling."""
        return cls(rescaling.heads, rescaling.times)

    def __call__(self, scales: Tensor) -> Tensor:
        """``(source channels,)`` to ``(target channels,)``."""
        return scales.view(self.heads, 1, -1).expand(-1, self.times, -1).reshape(-1)

    def reduce(self, values: Tensor) -> Tensor:
        """``(target channels,)`` to ``(source channels,)``: the mean over the copies."""
        return values.view(self.heads, self.times, -1).mean(1).reshape(-1)


FOLDED = translatable("is folded into the weights before anything is measured for their rounding")
"""When a ``ChannelScaling`` acts, for its traits."""
TRANSFORMS: Registry[type[Transform]] = Registry("transform", "quern.quantization.transforms")


def power_of_two(scales: Tensor) -> Tensor:
    """The nearest powers of two (in ratio), within the allowed exponents; 1 where a scale is not a positive number."""
    usable = torch.isfinite(scales) & (scales > 0)
    exponent = torch.where(usable, scales, 1.0).log2().round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.exp2(exponent)


def foldable(
    rescaling: Rescaling, source: nn.Module, scales: Tensor, rounded: Collection[str], stored: torch.dtype
) -> Tensor:
    """The scales nearest to ``scales`` by which ``rescaling`` loses nothing that rounding to codes will not lose anyway.

    ``rounded`` are the linears that become codes and take any scale. A norm keeps the dtype ``stored``: its scales are
    the ratios of its weights to the weights it can store. All else (biases, linears kept as they are) gets powers of two.
    """
    if set(rescaling.targets) <= set(rounded):
        weight = source.weight
        assert isinstance(weight, Tensor)
        usable = torch.where(torch.isfinite(scales) & (scales > 0), scales, 1.0)
        usable = usable.clamp(2.0**-LARGEST_EXPONENT, 2.0**LARGEST_EXPONENT)
        if rescaling.kind == "norm":
            divided = (weight.float() / usable).to(stored).float()
            return torch.where(divided.isfinite() & (divided != 0), weight.float() / divided, 1.0)
        if rescaling.source in rounded and getattr(source, "bias", None) is None:
            return usable
    return power_of_two(scales)


def fold(rescaling: Rescaling, module: Callable[[str], nn.Module], scales: Tensor, repeat: Repeat) -> None:
    """Divide the source's outputs by ``scales`` and multiply the targets' columns by them, in place."""
    source = module(rescaling.source)
    for parameter in (source.weight, getattr(source, "bias", None)):
        if parameter is not None:
            assert isinstance(parameter, Tensor)
            divisor = scales.to(parameter.dtype)
            parameter.data.div_(divisor[:, None] if parameter.dim() == 2 else divisor)
    wide = repeat(scales)
    for target in rescaling.targets:
        weight = module(target).weight
        assert isinstance(weight, Tensor)
        weight.data.mul_(wide.to(weight.dtype))
