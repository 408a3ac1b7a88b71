"""The heart of the main job: quantize one decoder block after the other, each on the outputs of the quantized ones.

A block is rewritten by the transforms, then its linears are rounded stage by stage, in the order in which data flows
through them, so that each is calibrated on what the rounded ones before it really deliver. The peak of memory is one
block, the Hessians of one stage and one wave of tokens, however many layers and tokens there are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quern.architectures.base import LinearGroup, Rescaling
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import Codec, codec_of
from quern.core.machine.heap import release_freed
from quern.core.machine.time_left import Work
from quern.core.plan import LinearPlan
from quern.core.recipe_parts import Transform
from quern.core.results import TunedBlock
from quern.pipeline.blockwise import sensitivity, work_units
from quern.pipeline.blockwise.disk_plan import DiskWatch
from quern.pipeline.blockwise.job import Job
from quern.pipeline.blockwise.record import record_of
from quern.pipeline.blockwise.reference_stream import ReferenceStream, references
from quern.pipeline.blockwise.safeguards.gate import Gate
from quern.pipeline.blockwise.tuning import BlockTuning, token_weights
from quern.quantization.block import Group, RoundedLinear, round_groups, round_linears, turn_back
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block, Tap
from quern.quantization.calibration.experts import Met, Reader, batches, make_up
from quern.quantization.calibration.sketch import Sketches, kept_of
from quern.quantization.calibration.statistics import GroupStatistics, Wanted, add_tap, add_up, collector
from quern.quantization.calibration.token_weights import normalized
from quern.quantization.channels import channel_statistics, rescaled_together
from quern.quantization.rounding.base import ROUNDINGS, SLAB
from quern.quantization.scale_dtypes import fitting
from quern.quantization.transforms.base import (
    TRANSFORMS,
    ChannelScaling,
    InputRotation,
    Repeat,
    fold,
    foldable,
)

CHAIN = "chain"


def quantize_blocks(job: Job) -> None:
    """All blocks that are not done yet; each leaves a stage of the artifact and the next one's inputs."""
    layers = job.architecture.layers
    pending = [index for index in range(layers) if job.work.done(f"block {index}") is None]
    task = job.progress.task("quantizing blocks", layers, layers - len(pending), _in_order(job, pending))
    disk = DiskWatch(job)
    for index in pending:
        disk.before(index)
        quantize_block(job, index)
        task.advance()
    task.done()


def _in_order(job: Job, pending: Sequence[int]) -> list[Work]:
    """Of the blocks that are done, and then of those that are not."""
    work = work_units.blocks(job)
    return [*(one for index, one in enumerate(work) if index not in pending), *(work[index] for index in pending)]


def quantize_block(job: Job, index: int) -> None:
    """One block, from its inputs on disk to its files and its outputs on disk."""
    started = time.perf_counter()
    work = _BlockWork(job, index)
    work.transform()
    if job.follows_stream or job.two_sided:
        work.reference = ReferenceStream(job, work.block)
        work.reference.write_next()
        work.begin_tuning(work.reference)
    release_freed()
    for stage in work.block.spec.stages:
        work.quantize_stage(stage)
        release_freed()
        work.tune_between(stage)
    tuned = work.finish_tuning()
    release_freed()
    files = work.store()
    inputs = [] if work.source is None else work.run(work.source)
    work.gate.finish(work.rounded)
    record = {**record_of(job, work.rounded, work.prefix, work.met), **work.gate.record(), "inputs": inputs}
    record["seconds"] = time.perf_counter() - started
    if tuned is not None:
        record["tuning"] = tuned.model_dump(mode="json")
    job.work.finish(f"block {index}", files, record)
    if work.source is not None:
        work.source.path.unlink()  # the block is done: nobody needs its inputs any more
    if work.reference is not None:
        work.reference.end()


@dataclass(frozen=True)
class _Alike:
    """Linears that read the same input, rotated alike; names relative to the block."""

    linears: tuple[str, ...]
    wanted: Wanted
    """What is to be known of that input."""


class _BlockWork:
    """A block in memory, and what has been made of it so far."""

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        length = 1 if job.sequences is None else job.sequences.shape[1]
        self.block = Block(job.architecture, index, job.read, job.compute_dtype, length)
        self.prefix = self.block.spec.prefix
        self.source = None if job.sequences is None else job.activations(CHAIN, index)
        fisher = self.source is not None and sensitivity.needed(job)
        self.token_weights = sensitivity.token_weights(job, index) if fisher else {}
        self.plans: dict[str, LinearPlan] = {}
        self.codecs: dict[str, Codec] = {}
        for linear in self.block.spec.linears:
            if (plan := job.plan[self.prefix + linear.name]).quantized:
                self.plans[linear.name] = plan
                self.codecs[linear.name] = codec_of(plan.scheme)
        transforms = [TRANSFORMS.get(settings.method)(settings) for settings in job.recipe.transforms]
        self.scalings = [transform for transform in transforms if isinstance(transform, ChannelScaling)]
        self.rounded: list[RoundedLinear] = []
        self.met: dict[str, Met] = {}
        """Of linears of experts, how they were calibrated."""
        self.gate = Gate(job, index)
        self.reference: ReferenceStream | None = None
        self.tuning: BlockTuning | None = None

    def transform(self) -> None:
        """Rewrite the block: every scaling of the recipe along every rescaling of the architecture, in order."""
        groups = [[name for name in group.linears if name in self.codecs] for group in self.block.spec.groups]
        fitted: dict[str, Codec] = {}
        for linears in groups if self.scalings else []:
            weights = {name: self.block.linear(name).weight.data for name in linears}
            fitted |= fitting({name: self.codecs[name] for name in linears}, weights, self.job.workers)
        for scaling in self.scalings:
            for rescalings in rescaled_together(self.block.spec):
                self._rescale(scaling, rescalings, fitted)

    def _rescale(self, scaling: ChannelScaling, rescalings: Sequence[Rescaling], fitted: Mapping[str, Codec]) -> None:
        """Along ``rescalings``, none of which changes what another one's targets read."""
        assert self.source is not None
        chosen = [one for one in rescalings if any(name in fitted for name in one.targets)]
        if not chosen:
            return
        first = [one.targets[0] for one in chosen]
        known = channel_statistics(self.block, self.source, first, self.job.workers)
        for rescaling in chosen:
            codecs = {name: fitted[name] for name in rescaling.targets if name in fitted}
            statistics = known.get(rescaling.targets[0])
            if statistics is None:  # an expert that no token met
                continue
            repeat = Repeat.of(rescaling)
            targets = [self.block.linear(name).weight.data for name in codecs]
            wanted = scaling.scales(targets, list(codecs.values()), statistics, repeat, self.job.workers)
            source = self.block.module.get_submodule(rescaling.source)
            stored = self._stored_dtype(f"{rescaling.source}.weight")
            scales = foldable(rescaling, source, wanted, self.codecs, stored)
            fold(rescaling, self.block.module.get_submodule, scales, repeat)

    def quantize_stage(self, stage: Sequence[LinearGroup]) -> None:
        """Round the linears of one stage; their rounded weights replace the block's own."""
        alike = [part for group in stage for part in self._alike(group)]
        spread = self._many_small(alike)
        for some in batches(alike, self._hessian_bytes, self.job.hessian_bytes):
            for group, known in round_groups(self._groups(some), self.plans, self.prefix, spread, self.job.workers):
                self._round(group, known)

    def _groups(self, alike: Sequence[_Alike]) -> Iterator[Group]:
        """Weights and statistics of each."""
        for part, statistics in zip(alike, self._statistics(alike), strict=True):
            if self.reference is not None:
                wanted = [name for name, plan in self.plans.items() if plan.rounding.two_sided]
                own = [name for name in part.linears if name in wanted]
                statistics.outputs |= self.reference.output_statistics(own, wanted)
            weights = {name: self.block.linear(name).weight.data for name in part.linears}
            if self.tuning is not None:
                self.tuning.remember(weights)
            self.gate.look_at_inputs(part.linears, statistics)
            yield weights, statistics, part.wanted.signs

    def _round(self, group: Group, known: Sequence[RoundedLinear] | None) -> None:
        """Round linears that share an input, unless they are ``known``, as far as the gate lets them pass."""
        weights, statistics, signs = group

        def rounded(plans: Mapping[str, LinearPlan], again: bool) -> list[RoundedLinear]:
            if known is not None and not again:
                return list(known)
            chosen = {name: weights[name] for name in plans}
            left = GroupStatistics(histogram=statistics.histogram) if again else statistics  # the rest was used up
            turned = again and known is None
            return round_linears(chosen, plans, left, self.job.workers, signs, self.prefix, turned)

        passed = self.gate.passed({name: self.plans[name] for name in weights}, rounded)
        for linear in passed:
            self.block.linear(linear.name).weight.data = linear.decoded
            self.rounded.append(linear)
        for name in set(weights) - {linear.name for linear in passed}:
            if known is None:
                turn_back(weights[name], signs, self.job.workers)
            del self.plans[name], self.codecs[name]

    def _many_small(self, alike: Sequence[_Alike]) -> bool:
        """Whether there are more groups (of experts, that is) than slabs of the largest of their linears."""
        rows = [self.block.linear(name).out_features for part in alike for name in part.linears]
        return len(alike) > max(rows, default=0) // SLAB

    def _alike(self, group: LinearGroup) -> list[_Alike]:
        """The quantized linears of a group, those together that read their input rotated alike, or as it is."""
        by_rotation: dict[Transform | None, list[str]] = {}
        for name in group.linears:
            if name in self.plans:
                by_rotation.setdefault(self.plans[name].rotation, []).append(name)
        return [
            _Alike(tuple(linears), self._wanted(linears, self._signs(rotation, linears[0], group)))
            for rotation, linears in by_rotation.items()
        ]

    def _signs(self, rotation: Transform | None, linear: str, group: LinearGroup) -> Tensor | None:
        if rotation is None:
            return None
        method = TRANSFORMS.get(rotation.method)(rotation)
        assert isinstance(method, InputRotation)
        return method.signs(self.block.linear(linear).in_features, self.job.seed, self.index, group.name)

    def _wanted(self, linears: Sequence[str], signs: Tensor | None) -> Wanted:
        """A Hessian for each linear where linears have token weights of their own; else one for all that want it alike."""
        plans = {name: self.plans[name] for name in linears}
        own = [name for name, plan in plans.items() if ROUNDINGS.get(plan.rounding.method).needs_hessian]
        if not self.token_weights:
            first = {
                (p.rounding.damping, p.rounding.activation_order): n for n, p in reversed(plans.items()) if n in own
            }
            own = [name for name in own if name in first.values()]
        weights = {name: normalized(self.token_weights[name]) for name in own if self.token_weights}
        return Wanted(
            hessians=tuple(own) if self.source is not None else (),
            token_weights={name: values for name, (values, _) in weights.items()},
            loss_scales={name: scale for name, (_, scale) in weights.items()},
            weigh_by_norm=self.job.recipe.calibration.token_weight == "norm",
            histogram=any(plan.activations.mode == "static" for plan in plans.values()),
            signs=signs,
            drifts=(drifts := self._drifts(plans)),
            moved={} if self.tuning is None else {name: self.block.linear(name).weight.data for name in drifts},
        )

    def _drifts(self, plans: Mapping[str, LinearPlan]) -> dict[str, Tensor]:
        """Unquantized weights of those that make up for drift. Which tokens meet an expert drifts too: experts do not."""
        if self.reference is None or self.source is None:
            return {}
        wanted = [name for name, plan in plans.items() if plan.rounding.target == "drift"]
        return {name: self.reference.weight(name) for name in wanted if self.block.spec.linear(name).expert is None}

    def _statistics(self, alike: Sequence[_Alike]) -> list[GroupStatistics]:
        """What is wanted of the inputs of each, from one pass over the calibration tokens."""
        found = [collector(part.wanted, self._columns(part), self.job.device) for part in alike]
        looked_at = [(part, statistics) for part, statistics in zip(alike, found, strict=True) if part.wanted]
        if self.source is None or not looked_at:
            return found
        first = list(dict.fromkeys(part.linears[0] for part, _ in looked_at))
        drifting = [name for part, _ in looked_at for name in part.wanted.drifts]
        others = {place for name in drifting if (place := self.block.spec.linear(name).added_to) is not None}
        reference = self.reference if drifting else None
        with self._lent(reference):
            for start, taps, unquantized in self._taps(first, sorted(others), reference):
                for part, statistics in looked_at:
                    tap = taps[part.linears[0]]
                    beside = (
                        references(part.linears, self.block, taps, unquantized, start) if part.wanted.drifts else {}
                    )
                    add_tap(statistics, part.wanted, start * self.source.shape[1], tap, self.job.workers, beside)
        add_up(found, self.job.workers)
        self.met |= make_up(self.block, self.source, self._readers(looked_at), self.job.workers)
        return found

    def _readers(self, looked_at: Sequence[tuple[_Alike, GroupStatistics]]) -> list[Reader]:
        """Those of ``looked_at`` that are of experts and get a Hessian."""
        found = []
        for part, statistics in looked_at:
            expert = self.block.spec.linear(part.linears[0]).expert
            if expert is not None and part.wanted.hessians:
                found.append(Reader(part.linears, expert, part.wanted, statistics))
        return found

    def _taps(
        self, linears: Sequence[str], others: Sequence[str], reference: ReferenceStream | None
    ) -> Iterator[tuple[int, dict[str, Tap], dict[str, Tap]]]:
        """Of each wave its first sequence, and what the block and the unquantized one beside it hand out."""
        source, workers = self.source, self.job.workers
        assert source is not None

        def wave(start: int, stop: int) -> tuple[int, dict[str, Tap], dict[str, Tap]]:
            taps = self.block.capture(linears, source.read(start, stop), workers, others)
            return start, taps, {} if reference is None else reference.capture(linears, others, start, stop)

        return workers.ahead(wave, source.waves())

    @contextmanager
    def _lent(self, reference: ReferenceStream | None) -> Iterator[None]:
        """Inside, the block and the one beside it stay as they are."""
        with self.block.lent(self.job.workers):
            if reference is None:
                yield
                return
            with reference.block.lent(self.job.workers):
                yield

    def begin_tuning(self, reference: ReferenceStream) -> None:
        """Where the recipe says so."""
        if self.job.recipe.tuning is not None and self.source is not None:
            weights = token_weights(self.job, self.block.spec, self.token_weights, reference)
            self.tuning = BlockTuning(self.job, self.block, reference, self.source, weights, self._stored_dtype)

    def tune_between(self, stage: Sequence[LinearGroup]) -> None:
        """Train what is not rounded yet behind ``stage`` to make up for what is."""
        if self.tuning is not None and stage != self.block.spec.stages[-1]:
            self.tuning.between(self.rounded)
            release_freed()

    def finish_tuning(self) -> TunedBlock | None:
        """Train what was rounded towards the unquantized block."""
        if self.tuning is None:
            return None
        self.rounded, tuned = self.tuning.finish(self.rounded)
        return tuned

    def _hessian_bytes(self, part: _Alike) -> int:
        """Of experts; what all tokens meet is never cut, since its stage is one group."""
        return len(part.wanted.hessians) * 4 * self._columns(part) ** 2

    def _columns(self, part: _Alike) -> int:
        return self.block.linear(part.linears[0]).in_features

    def store(self) -> list[Any]:
        """Hand the whole block to the format; its files."""
        writer = self.job.writer
        writer.begin(self.job.work, self.index + 1)
        for linear in self.rounded:
            writer.put(self.prefix + linear.name, linear.packed)
        for name, parameter in self.block.module.named_parameters():
            if name.removesuffix(".weight") not in self.codecs:  # transforms included, in the checkpoint's own dtype
                writer.put_plain(self.prefix + name, parameter.data.to(self._stored_dtype(name)))
        return writer.end()

    def _stored_dtype(self, name: str) -> torch.dtype:
        """The checkpoint's own dtype of the block's parameter ``name``."""
        return DTYPES[self.job.checkpoint.info(self.block.spec.sources_of(name)[0].tensor).dtype]

    def run(self, source: ActivationFile) -> list[dict[str, Any]]:
        """What the rounded block makes of its inputs is written for the next one; what the journal keeps of the inputs of
        its linears (``InputSummary``)."""
        certain = {linear.name for linear in self.block.spec.linears if linear.expert is None} & set(self.plans)
        alike = [[name for name in group.linears if name in certain] for group in self.block.spec.groups]
        first = {linears[0]: [self.prefix + name for name in linears] for linears in alike if linears}
        seen: list[dict[str, Sketches]] = []

        def watched(start: int, stop: int) -> tuple[Tensor, list[dict[str, Sketches]]]:
            return self.block.watch(list(first), source.read(start, stop), self.job.workers, Sketches.of)

        def outputs() -> Iterator[Tensor]:
            for found, sketches in self.job.workers.ahead(watched, source.waves()):
                seen.extend(sketches)
                read = [float(one.greatest.max()) for by_linear in sketches for one in by_linear.values()]
                self.gate.look_at_outputs(found, max(read, default=0.0))
                yield found

        with self.block.lent(self.job.workers):
            if self.index + 1 < self.job.architecture.layers:
                following = self.job.activations(CHAIN, self.index + 1)
                following.write_all(outputs())
                self.job.work.finish(f"{CHAIN} {self.index + 1}", [following.path], {})
            else:
                for _ in outputs():
                    pass
        as_they_are = [linear for linear in self.rounded if linear.input_signs is None]
        scales = {linear.name: linear.input_scale for linear in as_they_are if linear.input_scale is not None}
        return [kept.model_dump(mode="json") for kept in kept_of(seen, first, scales)]
