"""What calibration knows of the inputs of one group of linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers
from quern.quantization.calibration.block import Tap
from quern.quantization.calibration.drift import Drift, Reference
from quern.quantization.calibration.hessian import Run, add_runs, add_to_hessian, norm_weights
from quern.quantization.calibration.histogram import InputHistogram
from quern.quantization.calibration.outputs import OutputStatistics
from quern.rotation.rotation import rotate

ROTATED_TOKENS = 512
"""Tokens that a worker rotates at a time."""
NO_REFERENCES: Mapping[str, Reference] = {}


@dataclass(frozen=True)
class Wanted:
    """What to collect of the inputs of linears that read the same ones."""

    hessians: tuple[str, ...] = ()
    """The linears that get a Hessian each; where tokens have no weights of a linear's own, one stands for its group."""
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """By linear: weights float32 ``(tokens,)`` of all calibration tokens; empty for none."""
    loss_scales: Mapping[str, float] = field(default_factory=dict)
    """By linear: what the token weights were divided by."""
    weigh_by_norm: bool = False
    """Whether each token is scaled to unit norm instead."""
    histogram: bool = False
    """Whether the sizes of inputs are counted, for a static scale."""
    signs: Tensor | None = None
    """Packed signs of the rotation of the inputs; None: they are not rotated."""
    drifts: Mapping[str, Tensor] = field(default_factory=dict)
    """The linears that are to make up for drift, with their weights in the unquantized model."""
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    """Of these the ones that are no longer so before they are rounded, with their weights."""

    def __bool__(self) -> bool:
        return bool(self.hessians) or self.histogram


@dataclass
class Statistics:
    """Of the inputs of one linear, or of those that share them."""

    hessian: Tensor | None
    """Float32 ``(columns, columns)``, upper triangle: sum over tokens of weight x input input^T."""
    loss_scale: float = 1.0
    """What token weights were divided by: the Hessian of the loss itself is so many times greater."""
    tokens: int = 0
    """Tokens that met the linear."""
    runs: list[Run] = field(default_factory=list)
    """What is still to be added to the Hessian (``add_up``)."""

    def take_hessian(self) -> Tensor:
        """The Hessian, which the caller may overwrite; it is gone here."""
        hessian, self.hessian = self.hessian, None
        assert hessian is not None, "a Hessian is used once"
        return hessian


@dataclass
class GroupStatistics:
    """Of the inputs of one group of linears."""

    by_linear: dict[str, Statistics] = field(default_factory=dict)
    histogram: InputHistogram | None = None
    drifts: dict[str, Drift] = field(default_factory=dict)
    outputs: dict[str, OutputStatistics] = field(default_factory=dict)
    """By linear: of the gradients at its outputs."""
    silent: Tensor | None = None
    """Which inputs, as the block hands them out, were zero for all tokens so far: bool ``(columns,)``."""


def collector(wanted: Wanted, columns: int, device: torch.device) -> GroupStatistics:
    """Nothing seen yet of inputs ``(tokens, columns)``."""
    return GroupStatistics(
        {
            name: Statistics(torch.zeros(columns, columns, device=device), wanted.loss_scales.get(name, 1.0))
            for name in wanted.hessians
        },
        InputHistogram() if wanted.histogram else None,
        {
            name: Drift(weight, torch.zeros(weight.shape, device=device), wanted.moved.get(name))
            for name, weight in wanted.drifts.items()
        },
        silent=torch.ones(columns, dtype=torch.bool, device=device),
    )


def add_tap(
    found: GroupStatistics,
    wanted: Wanted,
    start: int,
    tap: Tap,
    workers: Workers,
    references: Mapping[str, Reference] = NO_REFERENCES,
) -> None:
    """Add what one run of the block handed out; ``start`` is the position of its first token among all calibration tokens.

    ``references``: of the linears whose drift is wanted. Sums are added up run by run, so that they depend on how the
    calibration text is cut and on nothing else. When all runs are there, ``add_up`` is called.
    """
    inputs, lent = tap.inputs, None
    if found.silent is not None:
        found.silent &= ~inputs.any(0)
    if wanted.signs is not None:
        signs = wanted.signs
        inputs = torch.cat(workers.map(lambda part: rotate(part, signs), torch.split(inputs, ROTATED_TOKENS)))
    if found.histogram is not None and len(inputs):
        found.histogram.add(inputs)
    for name in dict.fromkeys([*found.by_linear, *found.drifts]):
        weights = norm_weights(inputs) if wanted.weigh_by_norm else None
        if wanted.token_weights:
            weights = tap.of_tokens(wanted.token_weights[name][start : start + tap.length])
        if name in found.by_linear:
            statistics = found.by_linear[name]
            assert statistics.hessian is not None
            if workers.elsewhere:
                lent = workers.lend(inputs) if lent is None else lent
                statistics.runs.append(Run(lent, weights))
            else:
                add_to_hessian(statistics.hessian, inputs, weights, workers)
            statistics.tokens += len(inputs)
        if name in found.drifts:
            found.drifts[name].add(tap.inputs, inputs, weights, references[name], workers)


def add_up(found: Sequence[GroupStatistics], workers: Workers) -> None:
    """Add what ``add_tap`` left for other processes to add."""
    late = [one for group in found for one in group.by_linear.values() if one.runs]
    if late:
        add_runs([one.hessian for one in late if one.hessian is not None], [one.runs for one in late], workers)
    for one in late:
        one.runs.clear()
