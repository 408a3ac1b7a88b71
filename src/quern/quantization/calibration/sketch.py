"""What linears read, in small: kept by an artifact, so that another text's inputs can be held against calibration's.

Of each part of a text (a sequence) a sketch counts |x| in bins of an eighth of an octave and adds up x^2 by runs of
channels. Counts add up exactly, so that any halves of the calibration text can be compared: how far these lie apart is what
chance does, and no threshold has to be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quern.core.artifact import InputSummary
from quern.core.seeds import generator
from quern.quantization.calibration.histogram import LEVELS

LOWEST, OCTAVES, PER_OCTAVE = -30, 64, 8
"""Bins from 2^-30 to 2^34; what is smaller or greater lies in the first or last one."""
BINS = OCTAVES * PER_OCTAVE
MANTISSA_BITS = 23
RUNS = 16
"""Runs of neighbouring channels whose shares of the energy are the profile."""
REACH = 0.999
"""Share of all |x| that lies within the reach: the least that a scale should cover, and no single outlier moves it."""
HALVES = 99
"""Random halves of the calibration text that are compared: a difference above all of theirs has 1 chance in 100."""
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
        channels = sizes.square_().sum(0).double()
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


def halves(parts: int, seed: int) -> Tensor | None:
    """``HALVES`` choices of half of ``parts`` parts of a text, float64 ``(HALVES, parts)`` of zeros and ones; None for fewer
    parts than have so many choices, 9."""
    if math.comb(parts, parts // 2) < HALVES:
        return None
    random = generator(seed, "halves of the calibration text")
    chosen = np.zeros((HALVES, parts))
    for row in chosen:
        row[random.permutation(parts)[: parts // 2]] = 1
    return torch.from_numpy(chosen)


def summary(
    linears: Sequence[str], found: Sketches, chosen: Tensor | None, clip: float | None
) -> tuple[InputSummary, float | None]:
    """What an artifact keeps of the inputs that ``linears`` share, from the sketches of all sequences; and the greatest
    score among the ``halves`` that are ``chosen``.

    A score is a difference over the root mean square of that difference between halves, the greater of both kinds.
    ``clip``: what static activations cut |x| at.
    """
    whole = found.summed()
    reach, profile = whole.reach(), whole.profile()
    spread, limit = None, None
    if chosen is not None:
        one, other = found.summed(chosen), found.summed(1 - chosen)
        apart = differences(one.reach(), one.profile(), other.reach(), other.profile())
        deviation = apart.square().mean(0).sqrt().clamp(min=FINEST)
        limit = float((apart / deviation).max())
        spread = (_short(deviation[0]), _short(deviation[1]))
    kept = InputSummary(
        linears=tuple(linears),
        reach=_short(reach),
        greatest=_short(whole.greatest),
        profile=tuple(_short(share) for share in profile[0]),
        spread=spread,
        clip=clip,
        clipped=None if clip is None else _short(whole.beyond(clip)),
    )
    return kept, limit


def kept_of(
    seen: Sequence[Mapping[str, Sketches]], alike: Mapping[str, Sequence[str]], scales: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """What the journal keeps of the inputs of one block: ``inputs``, a list of ``InputSummary``, and ``input_limit``.

    ``seen``: of each sequence the sketches, by the first of the linears that share an input. ``alike``: the full names of
    these, by the same. ``scales``: those of static activations, likewise.
    """
    chosen = halves(len(seen), seed)
    kept, limits = [], []
    for first, linears in alike.items():
        clip = LEVELS / 2 * scales[first] if first in scales else None
        one, limit = summary(linears, Sketches.joined([sketches[first] for sketches in seen]), chosen, clip)
        kept.append(one.model_dump(mode="json"))
        limits += [] if limit is None else [limit]
    return {"inputs": kept, "input_limit": max(limits, default=None)}


def _short(value: Tensor) -> float:
    """Five digits, which say more than is known."""
    return float(f"{float(value):.5g}")
