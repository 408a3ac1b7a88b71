"""What is special about calibrating experts: there are many, and some meet few of the calibration tokens.

Hessians of a stage are built in batches of a size. Where an expert met fewer tokens than an eighth of the inputs of one of
its linears, others stand in for them, in this order:

1. all tokens, each weighted by the router's softmax for that expert, if these weights amount to enough tokens, as
   (sum w)^2 / sum w^2 counts them (Kish 1965)
2. all tokens alike: the mean Hessian of what the expert would read
3. none, where even these say nothing: the linear is rounded to nearest
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from quern.core.machine.parallel import Workers
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block, Tap
from quern.quantization.calibration.hessian import norm_weights
from quern.quantization.calibration.statistics import GroupStatistics, Wanted, add_tap, add_up, collector

COLUMNS_PER_TOKEN = 8
"""An expert that meets fewer tokens than one for so many inputs gets others in their place."""
ROUTER, ALIKE, NEAREST = "router weights", "all tokens", "nearest"
_SHOWN = 3
Part = TypeVar("Part")


@dataclass(frozen=True)
class Met:
    """How an expert's linears were calibrated."""

    share: float
    """Of the calibration tokens that met it."""
    stand_in: str | None = None
    """What stood in for more of them; None: they were enough."""


@dataclass(frozen=True)
class Reader:
    """Linears of an expert that share an input, and what is wanted and known of that."""

    linears: tuple[str, ...]
    expert: int
    wanted: Wanted
    found: GroupStatistics

    @property
    def columns(self) -> int:
        """Its inputs."""
        return next(len(one.hessian) for one in self.found.by_linear.values() if one.hessian is not None)

    @property
    def tokens(self) -> int:
        """Calibration tokens that met it."""
        return max(one.tokens for one in self.found.by_linear.values())

    @property
    def starved(self) -> bool:
        """Whether these are too few."""
        return self.tokens < needed(self.columns)


def needed(columns: int) -> int:
    """Tokens that a linear of so many inputs should meet."""
    return max(1, columns // COLUMNS_PER_TOKEN)


def batches(parts: Iterable[Part], size: Callable[[Part], int], most: int) -> Iterator[list[Part]]:
    """``parts`` in order, together as many as have a ``size`` of at most ``most``; at least one."""
    taken: list[Part] = []
    total = 0
    for part in parts:
        if taken and total + size(part) > most:
            yield taken
            taken, total = [], 0
        taken.append(part)
        total += size(part)
    if taken:
        yield taken


def make_up(block: Block, source: ActivationFile, readers: Sequence[Reader], workers: Workers) -> dict[str, Met]:
    """Replace what is known of starved readers by what stands in for it; how each was calibrated, by linear."""
    length = source.shape[0] * source.shape[1]
    met = {name: Met(reader.tokens / length) for reader in readers for name in reader.linears}
    starved = [reader for reader in readers if reader.starved]
    if not starved:
        return met
    effective = _effective(block, source, [reader.expert for reader in starved], workers)
    others = [
        _Others(reader, count >= needed(reader.columns)) for reader, count in zip(starved, effective, strict=True)
    ]
    for inputs, shares in _waves(block, source, workers):
        for some in batches(others, lambda one: 1, workers.threads):
            read = workers.map(partial(_read_by, block, inputs), [one.reader.linears[0] for one in some])
            for one, own in zip(some, read, strict=True):
                one.add(own, shares[:, one.reader.expert], workers)
    add_up([one.found for one in others], workers)
    for one in others:
        kind = one.finish()
        met |= {name: replace(met[name], stand_in=kind) for name in one.reader.linears}
    return met


class _Others:
    """The tokens that stand in for those of a starved reader."""

    def __init__(self, reader: Reader, weighed: bool) -> None:
        self.reader, self.weighed, self.weight = reader, weighed, 0.0
        self.wanted = replace(
            reader.wanted, histogram=reader.wanted.histogram and not reader.tokens, weigh_by_norm=False
        )
        first = next(iter(reader.found.by_linear.values())).hessian
        assert first is not None
        columns, device = len(first), first.device
        for one in reader.found.by_linear.values():
            one.hessian = None  # its memory goes first
        self.found = collector(self.wanted, columns, device)

    def add(self, inputs: Tensor, shares: Tensor, workers: Workers) -> None:
        """Inputs ``(tokens, columns)``, and what the router gives the expert of each token."""
        weights = shares if self.weighed else torch.ones_like(shares)
        self.weight += float(weights.double().sum())
        if self.reader.wanted.weigh_by_norm:
            weights = weights * norm_weights(inputs)
        wanted = replace(self.wanted, token_weights=dict.fromkeys(self.wanted.hessians, weights.cpu()))
        add_tap(self.found, wanted, 0, Tap(inputs, None, len(inputs)), workers)

    def finish(self) -> str:
        """Put them in the reader's place, with a loss as great as if they weighed as much as its own; what they are."""
        mine = self.reader.found
        usable = True
        for name, one in self.found.by_linear.items():
            hessian = one.take_hessian()
            diagonal = hessian.diagonal()
            if not bool(diagonal.isfinite().all()) or not bool(diagonal.any()):
                hessian.zero_()  # which rounds to nearest
                usable = False
            weights = self.reader.wanted.token_weights.get(name)
            before = float(self.reader.tokens if weights is None else weights.double().sum())
            kept = mine.by_linear[name]
            kept.hessian = hessian
            kept.loss_scale *= before / self.weight if self.weight else 0.0
        mine.silent = self.found.silent
        if self.wanted.histogram:
            mine.histogram = self.found.histogram
        return NEAREST if not usable else ROUTER if self.weighed else ALIKE


def _waves(block: Block, source: ActivationFile, workers: Workers) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each wave what experts read ``(tokens, width)``, and the router's softmax float32 ``(tokens, experts)``."""
    router = block.spec.router
    assert router is not None
    module = block.module.get_submodule(router)

    def shares(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(inputs)[0]
        return logits.float().softmax(-1)

    for start, stop in source.waves():
        inputs = block.capture((), source.read(start, stop), workers, (router,))[router].inputs
        (found,) = workers.map(shares, [inputs])
        yield inputs, found


def _effective(block: Block, source: ActivationFile, experts: Sequence[int], workers: Workers) -> list[float]:
    """To how many tokens the router's weights amount, for each of ``experts``."""
    sums = squares = torch.zeros(len(experts), dtype=torch.float64)
    for _, shares in _waves(block, source, workers):
        own = shares[:, list(experts)].double().cpu()
        sums, squares = sums + own.sum(0), squares + own.square().sum(0)
    return [float(value) for value in torch.where(squares > 0, sums.square() / squares, 0)]


def _read_by(block: Block, inputs: Tensor, linear: str) -> Tensor:
    """What an expert's ``linear`` reads ``(tokens, columns)`` where the expert reads ``inputs``."""
    seen: list[Tensor] = []
    handle = block.linear(linear).register_forward_pre_hook(lambda module, read: seen.append(read[0]))
    try:
        with torch.no_grad():
            block.module.get_submodule(linear.rpartition(".")[0])(inputs)
    finally:
        handle.remove()
    return seen[0]


def starved_note(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """What whoever uses the artifact should know of experts whose tokens others stand in for; ``layers``: as recorded."""
    named: dict[str, list[str]] = {}
    for layer in layers:
        if (kind := layer.get("stand_in")) is not None:
            named.setdefault(kind, []).append(layer["linear"])
    if not named:
        return []
    said = {
        ROUTER: "{} by all tokens, as the router weighs them",
        ALIKE: "{} by all tokens alike",
        NEAREST: "{} to nearest",
    }
    how = ", ".join(said[kind].format(len(named[kind])) for kind in said if kind in named)
    names = sorted(name for some in named.values() for name in some)
    more = f" and {len(names) - _SHOWN} more, which quern.json names" if len(names) > _SHOWN else ""
    return [
        f"{len(names)} linears are of experts that met fewer calibration tokens than one for {COLUMNS_PER_TOKEN} of their "
        f"inputs, and were rounded otherwise: {how} ({', '.join(names[:_SHOWN])}{more})"
    ]
