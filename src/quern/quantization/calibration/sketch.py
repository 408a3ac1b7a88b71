"""What linears read, in small: kept by an artifact, so that another text's inputs can be held against calibration's.

Of each part of a text (a sequence) a sketch counts |x| in bins of an eighth of an octave and adds up x^2 by runs of
channels. Counts add up exactly, so that all halves of the calibration text can be compared: how far these lie apart is what
chance does, and no threshold has to be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from quern.core.artifact import InputSummary
from quern.quantization.calibration.histogram import LEVELS

LOWEST, OCTAVES, PER_OCTAVE = -30, 64, 8
"""Bins from 2^-30 to 2^34; what is smaller or greater lies in the first or last one."""
BINS = OCTAVES * PER_OCTAVE
MANTISSA_BITS = 23
RUNS = 16
"""Runs of neighbouring channels whose shares of the energy are the profile."""
REACH = 0.999
"""Share of all |x| that lies within the reach: the least that a scale should cover, and no single outlier moves it."""
PARTS = 10
"""Runs of neighbouring sequences, hence of the same documents, into which the calibration text is cut to be halved, in all
ways. Halves of single sequences would hold pieces of the same documents, and differ by less than other documents of that
kind do."""
FINEST = 2.0**-9
"""Differences (in octaves, or of the profile) that are as nothing: about what interpolating within a bin leaves open."""


@dataclass(frozen=True)
class Sketches:
    """Of ``n`` parts of a text."""

    counts: Tensor
    """Of |x| in each bin, int64 ``(n, BINS)``."""
    energies: Tensor
    """Sums of x^2 by runs of channels, float64 ``(n, RUNS)``."""
    greatest: Tensor
    """Greatest |x|, float64 ``(n,)``."""

    @classmethod
    def of(cls, inputs: Tensor) -> Sketches:
        """Of one part: what a linear reads, ``(tokens, columns)``."""
        sizes = inputs.detach().float().abs().nan_to_num_()
        keys = sizes.view(torch.int32).bitwise_right_shift(MANTISSA_BITS - 3).sub_((127 + LOWEST) * PER_OCTAVE)
        counts = torch.bincount(keys.clamp_(0, BINS - 1).reshape(-1), minlength=BINS)
        top = sizes.amax().double() if sizes.numel() else torch.zeros((), dtype=torch.float64)
        channels = sizes.square().sum(0).double()
        if not bool(channels.isfinite().all()):
            channels = sizes.double().square_().sum(0)
        runs = torch.stack([run.sum() for run in channels.tensor_split(RUNS)])
        return cls(counts.cpu()[None], runs.cpu()[None], top.cpu()[None])

    @classmethod
    def joined(cls, parts: Sequence[Sketches]) -> Sketches:
        """Those of several texts, in order."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("counts", "energies", "greatest")))

    def summed(self, chosen: Tensor | None = None) -> Sketches:
        """One sketch of all parts; with ``chosen``, float64 ``(m, n)`` of zeros and ones, one of each of those choices."""
        if chosen is None:
            chosen = torch.ones(1, len(self.counts), dtype=torch.float64)
        counts = (chosen @ self.counts.double()).long()  # exact: no count comes near 2^53
        greatest = torch.where(chosen > 0, self.greatest, 0.0).amax(1)
        return Sketches(counts, chosen @ self.energies, greatest)

    def reach(self, share: float = REACH) -> Tensor:
        """The |x| below which ``share`` of all lie, float64 ``(n,)``, interpolated within a bin; 0 where all are."""
        reached = self.counts.cumsum(1).double()
        wanted = share * reached[:, -1:]
        bins = torch.searchsorted(reached, wanted).clamp_(max=BINS - 1)
        before = torch.where(bins > 0, reached.gather(1, (bins - 1).clamp(min=0)), 0.0)
        within = (wanted - before) / self.counts.gather(1, bins).clamp(min=1)
        low, high = _edges()[bins], _edges()[bins + 1]
        found = (low + within.clamp(0, 1) * (high - low)).squeeze(1)
        return torch.minimum(found, self.greatest)

    def beyond(self, size: float) -> Tensor:
        """The share of |x| above ``size``, float64 ``(n,)``, interpolated within a bin."""
        edges = _edges()
        covered = ((edges[1:] - size) / (edges[1:] - edges[:-1])).clamp(0, 1)
        above = (self.counts.double() * covered).sum(1) / self.counts.sum(1).clamp(min=1)
        return torch.where(self.greatest > size, above, 0.0)

    def profile(self) -> Tensor:
        """Each run's share of the energy, float64 ``(n, RUNS)``."""
        total = self.energies.sum(1, keepdim=True)
        return torch.where(total > 0, self.energies / total, 1.0 / RUNS)


def _edges() -> Tensor:
    """Edges of the bins, float64 ``(BINS + 1,)``; the first one is 0."""
    steps = torch.arange(BINS + 1, dtype=torch.float64)
    octave = (steps / PER_OCTAVE).floor()
    edges = 2.0 ** (octave + LOWEST) * (1 + (steps - PER_OCTAVE * octave) / PER_OCTAVE)
    edges[0] = 0.0
    return edges


def differences(reach: Tensor, profile: Tensor, other_reach: Tensor, other_profile: Tensor) -> Tensor:
    """How far texts lie apart, float64 ``(n, 2)``: |log2| of the ratio of their reaches, ``(n,)``, and the Hellinger
    distance of their profiles, ``(n, RUNS)``."""
    least = 2.0 ** (LOWEST - 3)
    octaves = (reach.clamp(min=least) / other_reach.clamp(min=least)).log2().abs()
    distance = (profile.sqrt() - other_profile.sqrt()).square().sum(-1).div(2).sqrt()
    return torch.stack([octaves, distance], dim=-1)


def halves() -> Tensor:
    """One half of each way to halve ``PARTS`` parts, float64 ``(126, PARTS)`` of zeros and ones."""
    chosen = [half for half in combinations(range(PARTS), PARTS // 2) if 0 in half]
    return torch.zeros(len(chosen), PARTS, dtype=torch.float64).scatter_(1, torch.tensor(chosen), 1.0)


def parts_of(sequences: Sketches) -> Sketches | None:
    """The sketches of all sequences, in order, added up to those of ``PARTS`` parts; None for fewer sequences."""
    count = len(sequences.counts)
    if count < PARTS:
        return None
    owner = torch.arange(count) * PARTS // count
    return sequences.summed((owner == torch.arange(PARTS)[:, None]).double())


def summary(linears: Sequence[str], sequences: Sketches, clip: float | None) -> InputSummary:
    """What an artifact keeps of the inputs that ``linears`` share, from the sketches of all sequences.

    ``clip``: what static activations cut |x| at.
    """
    whole, parts = sequences.summed(), parts_of(sequences)
    reach, profile = whole.reach(), whole.profile()
    spread = None
    if parts is not None:
        one, other = parts.summed(halves()), parts.summed(1 - halves())
        apart = differences(one.reach(), one.profile(), other.reach(), other.profile())
        deviation = apart.square().mean(0).sqrt().clamp(min=FINEST)
        spread = (_short(deviation[0]), _short(deviation[1]))
    return InputSummary(
        linears=tuple(linears),
        reach=_short(reach),
        greatest=_short(whole.greatest),
        profile=tuple(_short(share) for share in profile[0]),
        spread=spread,
        clip=clip,
        clipped=None if clip is None else _short(whole.beyond(clip)),
    )


def kept_of(
    seen: Sequence[Mapping[str, Sketches]], alike: Mapping[str, Sequence[str]], scales: Mapping[str, float]
) -> list[InputSummary]:
    """What an artifact keeps of the inputs of one block.

    ``seen``: of each sequence the sketches, by the first of the linears that share an input. ``alike``: the full names of
    these, by the same. ``scales``: those of static activations, likewise.
    """
    clips = {first: LEVELS / 2 * scale for first, scale in scales.items()}
    return [
        summary(linears, Sketches.joined([sketches[first] for sketches in seen]), clips.get(first))
        for first, linears in alike.items()
    ]


def _short(value: Tensor) -> float:
    """Five digits, which say more than is known."""
    return float(f"{float(value):.5g}")
