"""The heart of the main job: quantize one decoder block after the other, each on the outputs of the quantized ones.

A block is rewritten by the transforms, then its linears are rounded group by group, in the order in which data flows
through them, so that each group is calibrated on what the rounded groups before it really deliver. The peak of memory
is one block, the Hessians of one group and one wave of tokens, however many layers and tokens there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quern.architectures.base import LinearGroup, Rescaling
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import CODECS, Codec
from quern.core.heap import release_freed
from quern.core.parallel import pieces
from quern.observers.base import OBSERVERS
from quern.pipeline import sensitivity
from quern.pipeline.job import Job
from quern.quantization import scale_dtypes as scales
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.hessian import add_to_hessian, norm_weights
from quern.quantization.calibration.histogram import InputHistogram
from quern.quantization.rounding._factor import Factor, factorize
from quern.quantization.rounding.base import ROUNDINGS, SLAB, Rounded
from quern.quantization.transforms.base import (
    TRANSFORMS,
    ChannelScaling,
    ChannelStatistics,
    InputRotation,
    Repeat,
    fold,
    foldable,
)
from quern.rotation.rotation import rotate, rotate_back

CHAIN = "chain"
SAMPLED_TOKENS = 256
"""Tokens that the search of AWQ looks at, at most."""
ROTATED_TOKENS = 512
"""Tokens that a worker rotates at a time."""


def quantize_blocks(job: Job) -> None:
    """All blocks that are not done yet; each leaves a shard of the artifact and the next one's inputs."""
    layers = job.architecture.layers
    pending = [index for index in range(layers) if job.work.done(f"block {index}") is None]
    task = job.progress.task("quantizing blocks", layers, layers - len(pending))
    for index in pending:
        quantize_block(job, index)
        task.advance()
    task.done()


def quantize_block(job: Job, index: int) -> None:
    """One block, from its inputs on disk to a shard and its outputs on disk."""
    started = time.perf_counter()
    work = _BlockWork(job, index)
    work.transform()
    release_freed()
    for group in job.architecture.groups:
        work.quantize_group(group)
        release_freed()
    tensors = work.tensors | work.unquantized()
    record = {"layers": work.errors, "scale_dtypes": work.scale_dtypes}
    shard = job.work.write_tensors(f"artifact/{job.shard(index + 1).removesuffix('.safetensors')}", tensors)
    if work.source is not None and index + 1 < job.architecture.layers:
        work.write_outputs(job.activations(CHAIN, index + 1), work.source)
    job.work.finish(f"block {index}", [shard], {**record, "seconds": time.perf_counter() - started})
    if work.source is not None:
        work.source.path.unlink()  # the block is done: nobody needs its inputs any more


class _BlockWork:
    """A block in memory, and what has been made of it so far."""

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        self.prefix = job.architecture.block_prefix(index)
        length = 1 if job.sequences is None else job.sequences.shape[1]
        self.block = Block(job.architecture, index, job.read, job.compute_dtype, length)
        self.source = None if job.sequences is None else job.activations(CHAIN, index)
        fisher = self.source is not None and job.recipe.calibration.token_weight == "fisher" and _uses_hessian(job)
        self.token_weights = sensitivity.token_weights(job, index) if fisher else {}
        self.codecs: dict[str, Codec] = {}
        for name in job.architecture.linears():
            scheme = job.recipe.scheme_for(self.prefix + name)
            if scheme.quantized:
                self.codecs[name] = CODECS.get(scheme.codec)(scheme)
        transforms = [TRANSFORMS.get(settings.method)(settings) for settings in job.recipe.transforms]
        self.scalings = [transform for transform in transforms if isinstance(transform, ChannelScaling)]
        self.rotation = next((transform for transform in transforms if isinstance(transform, InputRotation)), None)
        self.tensors: dict[str, Tensor] = {}
        self.scale_dtypes: dict[str, str] = {}
        self.errors: list[dict[str, Any]] = []

    def transform(self) -> None:
        """Rewrite the block: every scaling of the recipe along every rescaling of the architecture, in order."""
        groups = [[name for name in group.linears if name in self.codecs] for group in self.job.architecture.groups]
        fitted: dict[str, Codec] = {}
        for linears in groups if self.scalings else []:
            fitted |= self._fitting(linears)
        for scaling in self.scalings:
            for rescaling in self.job.architecture.rescalings:
                codecs = {name: fitted[name] for name in rescaling.targets if name in fitted}
                if not codecs:
                    continue
                statistics = self._channels(rescaling.targets[0])
                repeat = self._repeat(rescaling)
                targets = [self.block.linear(name).weight.data for name in codecs]
                wanted = scaling.scales(targets, list(codecs.values()), statistics, repeat, self.job.workers)
                source = self.block.module.get_submodule(rescaling.source)
                stored = self._stored_dtype(f"{rescaling.source}.weight")
                fold(
                    rescaling,
                    self.block.module.get_submodule,
                    foldable(rescaling, source, wanted, self.codecs, stored),
                    repeat,
                )

    def quantize_group(self, group: LinearGroup) -> None:
        """Round the linears of one group; their rounded weights replace the block's own."""
        linears = [name for name in group.linears if name in self.codecs]
        if not linears:
            return
        rounding = ROUNDINGS.get(self.job.recipe.rounding.method)(self.job.recipe.rounding)
        signs = None
        if self.rotation is not None:
            columns = self.block.linear(linears[0]).in_features
            signs = self.rotation.signs(columns, self.job.seed, self.index, group.name)
        hessians, input_scale = self._statistics(linears, signs)
        factor: Factor | None = None
        for name in linears:
            self._turn(self.block.linear(name).weight.data, signs, rotate)
        codecs = self._fitting(linears)
        dtypes = scales.changes({name: self.codecs[name].scheme for name in linears}, codecs)
        self.scale_dtypes |= {self.prefix + name: dtype for name, dtype in dtypes.items()}
        for name in linears:
            if name in hessians:
                settings = self.job.recipe.rounding
                factor = factorize(hessians.pop(name), settings.damping, settings.activation_order, self.job.workers)
            linear = self.block.linear(name)
            rounded = rounding.round(linear.weight.data, codecs[name], factor, self.job.workers)
            linear.weight.data = rounded.decoded
            self._turn(linear.weight.data, signs, rotate_back)
            self.tensors |= self.job.format.encode(self.prefix + name, rounded.weight, input_scale, signs)
            self.errors.append(layer_error(self.prefix + name, rounded, signs))

    def _fitting(self, linears: list[str]) -> dict[str, Codec]:
        """The codecs of ``linears``, which share an input, with scales that can be stored for their weights as they are."""
        weights = {name: self.block.linear(name).weight.data for name in linears}
        return scales.fitting({name: self.codecs[name] for name in linears}, weights, self.job.workers)

    def _turn(self, weight: Tensor, signs: Tensor | None, turn: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Rotate the rows of ``weight`` in place, if they are rotated at all."""
        if signs is None:
            return

        def piece(rows: tuple[int, int]) -> None:
            weight[rows[0] : rows[1]] = turn(weight[rows[0] : rows[1]], signs)

        self.job.workers.map(piece, pieces(len(weight), SLAB))

    def unquantized(self) -> dict[str, Tensor]:
        """The block's other tensors, transforms included, in the checkpoint's own dtypes."""
        tensors = {}
        for name, parameter in self.block.module.named_parameters():
            if name.removesuffix(".weight") not in self.codecs:
                tensors[self.prefix + name] = parameter.data.to(self._stored_dtype(name))
        return tensors

    def _stored_dtype(self, name: str) -> torch.dtype:
        """The checkpoint's own dtype of the block's tensor ``name``."""
        return DTYPES[self.job.checkpoint.info(self.prefix + name).dtype]

    def write_outputs(self, following: ActivationFile, source: ActivationFile) -> None:
        """What the rounded block makes of its inputs: the inputs of the next one."""
        following.write(lambda start, stop: self.block.run_each(source.read(start, stop), self.job.workers))
        self.job.work.finish(f"{CHAIN} {self.index + 1}", [following.path], {})

    def _statistics(self, linears: list[str], signs: Tensor | None) -> tuple[dict[str, Tensor], float | None]:
        """Hessians, and the scale of static activations, of inputs that are rotated where there are ``signs``.

        One Hessian for each linear where every linear has token weights of its own; otherwise one for all, under the
        first one's name.
        """
        recipe = self.job.recipe
        static = recipe.activations.mode == "static"
        own = (linears if self.token_weights else linears[:1]) if _uses_hessian(self.job) else []
        if self.source is None or not (own or static):
            return {}, None
        columns = self.block.linear(linears[0]).in_features
        hessians = {name: torch.zeros(columns, columns, device=self.job.device) for name in own}
        histogram = InputHistogram()
        for start, stop in self.source.waves():
            inputs = self.block.capture(linears[0], self.source.read(start, stop), self.job.workers)
            if signs is not None:
                inputs = torch.cat(
                    self.job.workers.map(lambda part: rotate(part, signs), torch.split(inputs, ROTATED_TOKENS))
                )
            tokens = slice(start * self.source.shape[1], stop * self.source.shape[1])
            if static:
                histogram.add(inputs)
            for name, hessian in hessians.items():
                weights = self.token_weights[name][tokens] if self.token_weights else None
                if recipe.calibration.token_weight == "norm":
                    weights = norm_weights(inputs)
                add_to_hessian(hessian, inputs, weights, self.job.workers)
        observer = OBSERVERS.get(recipe.activations.observer)()
        return hessians, histogram.scale(observer) if static else None

    def _channels(self, linear: str) -> ChannelStatistics:
        """Statistics of what ``linear`` reads."""
        assert self.source is not None
        total, largest, sample, tokens = torch.zeros(()), torch.zeros(()), [], 0
        waves = self.source.waves()
        for start, stop in waves:
            inputs = self.block.capture(linear, self.source.read(start, stop), self.job.workers).float()
            sizes = inputs.abs()
            total = total + sizes.sum(0, dtype=torch.float64)
            largest = torch.maximum(largest, sizes.amax(0))
            sample.append(inputs[:: max(1, len(waves) * len(inputs) // SAMPLED_TOKENS)])
            tokens += len(inputs)
        return ChannelStatistics((total / tokens).float(), largest, torch.cat(sample))

    def _repeat(self, rescaling: Rescaling) -> Repeat:
        config = self.job.architecture.config
        if rescaling.kind != "value":
            return Repeat(1, 1)
        return Repeat(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads)


def _uses_hessian(job: Job) -> bool:
    return ROUNDINGS.get(job.recipe.rounding.method).needs_hessian


def layer_error(name: str, rounded: Rounded, signs: Tensor | None = None) -> dict[str, Any]:
    """The entry of one linear in the artifact's provenance; see ``core.results.LayerError``."""
    rows, columns = rounded.weight.shape
    stored = rounded.weight.stored_bytes + (0 if signs is None else signs.nbytes)
    return {"linear": name, "bits_per_weight": 8 * stored / (rows * columns), "relative_error": rounded.relative_error}
