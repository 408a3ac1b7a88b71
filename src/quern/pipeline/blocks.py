"""The heart of the main job: quantize one decoder block after the other, each on the outputs of the quantized ones before.

A block is rewritten by the transforms, then its linears are rounded group by group, in the order in which data flows
through them, so that each group is calibrated on what the rounded groups before it really deliver. The peak of memory is
one block, one Hessian and one wave of tokens, however many layers and tokens there are.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from quern.architectures.base import LinearGroup, Rescaling
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import CODECS, Codec
from quern.observers.base import OBSERVERS
from quern.pipeline import sensitivity
from quern.pipeline.job import Job
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block
from quern.quantization.calibration.hessian import add_to_hessian, norm_weights
from quern.quantization.calibration.histogram import InputHistogram
from quern.quantization.rounding._factor import Factor, factorize
from quern.quantization.rounding.base import ROUNDINGS
from quern.quantization.transforms.base import TRANSFORMS, ChannelStatistics, Repeat, fold, power_of_two

CHAIN = "chain"
SAMPLED_TOKENS = 256
"""Tokens of a wave that AWQ's search looks at, at most."""


def quantize_blocks(job: Job) -> None:
    """All blocks that are not done yet; each leaves a shard of the artifact and the next one's inputs."""
    layers = job.architecture.layers
    task = job.progress.task("quantizing blocks", layers)
    for index in range(layers):
        if job.work.done(f"block {index}") is None:
            quantize_block(job, index)
        task.advance()
    task.done()


def quantize_block(job: Job, index: int) -> None:
    """One block, from its inputs on disk to a shard and its outputs on disk."""
    started = time.perf_counter()
    length = job.sequences.shape[1] if job.sequences is not None else 1
    block = Block(job.architecture, index, job.read, job.compute_dtype, length)
    source = job.activations(CHAIN, index) if job.sequences is not None else None
    weights = sensitivity.token_weights(job, index) if sensitivity.needed(job) else {}
    if source is not None and job.recipe.transforms:
        _transform(job, block, index, source)
    tensors: dict[str, Tensor] = {}
    errors: list[dict[str, Any]] = []
    for group in job.architecture.groups:
        _quantize_group(job, block, index, group, source, weights, tensors, errors)
    tensors |= _unquantized(job, block, index, tensors)
    shard = job.work.write_tensors(f"artifact/{job.shard(index + 1).removesuffix('.safetensors')}", tensors)
    files = [shard]
    if source is not None and index + 1 < job.architecture.layers:
        following = job.activations(CHAIN, index + 1)
        following.write(lambda a, b: block.run_each(source.read(a, b), job.workers))
        files.append(following.path)
        job.work.finish(f"{CHAIN} {index + 1}", [following.path], {})
    job.work.finish(f"block {index}", [shard], {"layers": errors, "seconds": time.perf_counter() - started})
    if source is not None:
        source.path.unlink()  # the block is done: nobody needs its inputs any more


def _quantize_group(
    job: Job,
    block: Block,
    index: int,
    group: LinearGroup,
    source: ActivationFile | None,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
    errors: list[dict[str, Any]],
) -> None:
    """Round the linears of one group; their rounded weights replace the block's own."""
    prefix = job.architecture.block_prefix(index)
    codecs = {name: codec for name in group.linears if (codec := _codec(job, prefix + name)) is not None}
    if not codecs:
        return
    rounding = ROUNDINGS.get(job.recipe.rounding.method)(job.recipe.rounding)
    static = job.recipe.activations.mode == "static"
    hessians, input_scale = _statistics(
        job, block, group, list(codecs), source, weights, rounding.needs_hessian, static
    )
    settings = job.recipe.rounding
    factor: Factor | None = None
    for name, codec in codecs.items():
        if rounding.needs_hessian and (factor is None or name in hessians):
            factor = factorize(hessians.pop(name), settings.damping, settings.activation_order, job.workers)
        linear = block.linear(name)
        rounded = rounding.round(linear.weight.data, codec, factor, job.workers)
        linear.weight.data = rounded.decoded
        tensors |= job.format.encode(prefix + name, rounded.weight, input_scale)
        elements = rounded.weight.shape[0] * rounded.weight.shape[1]
        errors.append(
            {
                "linear": prefix + name,
                "bits_per_weight": 8 * rounded.weight.stored_bytes / elements,
                "relative_error": rounded.relative_error,
            }
        )


def _codec(job: Job, linear: str) -> Codec | None:
    scheme = job.recipe.scheme_for(linear)
    return CODECS.get(scheme.codec)(scheme) if scheme.quantized else None


def _statistics(
    job: Job,
    block: Block,
    group: LinearGroup,
    linears: list[str],
    source: ActivationFile | None,
    weights: dict[str, Tensor],
    needs_hessian: bool,
    static: bool,
) -> tuple[dict[str, Tensor], float | None]:
    """Hessians (under the first linear's name where all linears of the group share one) and the static input scale."""
    if not (needs_hessian or static):
        return {}, None
    assert source is not None
    own = linears if weights else linears[:1]
    columns = block.linear(linears[0]).in_features
    hessians = {name: torch.zeros(columns, columns, device=job.device) for name in own} if needs_hessian else {}
    histogram = InputHistogram()
    tokens_before = 0
    for start, stop in source.waves():
        inputs = block.capture(linears[0], source.read(start, stop), job.workers)
        tokens = slice(tokens_before, tokens_before + len(inputs))
        tokens_before += len(inputs)
        for name, hessian in hessians.items():
            weight = weights[name][tokens] if weights else None
            if job.recipe.calibration.token_weight == "norm":
                weight = norm_weights(inputs)
            add_to_hessian(hessian, inputs, weight, job.workers)
        if static:
            histogram.add(inputs)
    observer = OBSERVERS.get(job.recipe.activations.observer)()
    return hessians, histogram.scale(observer) if static else None


def _transform(job: Job, block: Block, index: int, source: ActivationFile) -> None:
    """Rewrite the block: every transform of the recipe along every rescaling of the architecture, in order."""
    prefix = job.architecture.block_prefix(index)
    for settings in job.recipe.transforms:
        transform = TRANSFORMS.get(settings.method)(settings)
        for rescaling in job.architecture.rescalings:
            codecs = {name: codec for name in rescaling.targets if (codec := _codec(job, prefix + name)) is not None}
            if not codecs:
                continue
            statistics = _channels(job, block, rescaling.targets[0], source)
            repeat = _repeat(job, rescaling)
            targets = [block.linear(name).weight.data for name in codecs]
            scales = power_of_two(transform.scales(targets, list(codecs.values()), statistics, repeat, job.workers))
            fold(rescaling, block.module.get_submodule, scales, repeat)


def _repeat(job: Job, rescaling: Rescaling) -> Repeat:
    config = job.architecture.config
    if rescaling.kind != "value":
        return Repeat(1, 1)
    heads = config.num_key_value_heads
    return Repeat(heads, config.num_attention_heads // heads)


def _channels(job: Job, block: Block, linear: str, source: ActivationFile) -> ChannelStatistics:
    total: Tensor | None = None
    largest: Tensor | None = None
    sample = []
    tokens = 0
    waves = source.waves()
    for start, stop in waves:
        inputs = block.capture(linear, source.read(start, stop), job.workers).float()
        sizes = inputs.abs()
        total = sizes.sum(0, dtype=torch.float64) if total is None else total + sizes.sum(0, dtype=torch.float64)
        largest = sizes.amax(0) if largest is None else torch.maximum(largest, sizes.amax(0))
        sample.append(inputs[:: max(1, len(waves) * len(inputs) // SAMPLED_TOKENS)])
        tokens += len(inputs)
    assert total is not None
    assert largest is not None
    return ChannelStatistics((total / tokens).float(), largest, torch.cat(sample))


def _unquantized(job: Job, block: Block, index: int, written: dict[str, Tensor]) -> dict[str, Tensor]:
    """The block's other tensors, transforms included, in the checkpoint's own dtypes."""
    prefix = job.architecture.block_prefix(index)
    coded = {name for name in job.architecture.linears() if _codec(job, prefix + name) is not None}
    tensors = {}
    for name, parameter in block.module.named_parameters():
        if name.removesuffix(".weight") not in coded:
            dtype = DTYPES[job.checkpoint.info(prefix + name).dtype]
            tensors[prefix + name] = parameter.data.to(dtype)
    return tensors
