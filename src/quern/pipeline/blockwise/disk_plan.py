"""What a quantization will need on the disk, said before it starts and looked at again before every block.

Stages are counted by the parts of their codecs and by what stays as it is, without what formats add (zero points, padding),
for which ``ROOM`` stands; entropy coding, which makes them smaller, is not foreseen.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from quern.architectures.base import BlockSpec
from quern.checkpoint.safetensors_file import DTYPES
from quern.codecs.base import codec_of
from quern.core.errors import NotEnoughDiskError, option
from quern.core.plan import LinearPlan
from quern.core.text.units import bytes_text, rounded_up
from quern.formats.base import FORMATS
from quern.pipeline.blockwise import output_gradients, sensitivity
from quern.pipeline.blockwise.job import Job
from quern.quantization.calibration.drift import HELD_OUT
from quern.quantization.calibration.outputs import MOST_JUDGES

ROOM = 1.02
WORDS = 2048
"""Bytes that the journal, the index and the provenance say of a linear."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes of the work folder, which becomes the artifact, at the peak of each part of the work."""

    artifact: int
    """Of the finished stages."""
    sensitivity: int
    """While token weights are made: the inputs of all blocks, and gradients."""
    blocks: int
    """While the last block is rounded: all stages, activations, and what is kept of the pass before."""
    publishing: int
    """While stages become one file, where they do."""

    @property
    def peak(self) -> int:
        """The greatest of them."""
        return max(self.sensitivity, self.blocks, self.publishing)


def plan(job: Job) -> DiskPlan:
    """Count it, from the model's shapes and the recipe; of ``job`` neither the work folder nor a weight is looked at."""
    layers, activations = job.architecture.layers, activation_bytes(job)
    stages, format = [stage_bytes(job, stage) for stage in range(layers + 2)], FORMATS.get(job.recipe.format)
    artifact = sum(stages) + _companion_bytes(job)
    fisher = job.sequences is not None and sensitivity.needed(job)
    kept = _kept_bytes(job) + WORDS * len(job.plan) if fisher else 0
    # The inputs of all blocks and what leaves the last one; of gradients two, unless all are wanted again.
    again = fisher and output_gradients.recomputes(job)
    whole = (layers + 1) * activations
    streams = 2 * activations * (1 + job.follows_stream)
    joined = (max(stages) if format.moves_stages else artifact) if format.joins_stages else 0
    return DiskPlan(
        artifact=artifact,
        sensitivity=kept + whole + (whole if again else 2 * activations) if fisher else 0,
        blocks=artifact + streams + kept + (2 * whole if again else 0),
        publishing=artifact + joined + kept,
    )


def activation_bytes(job: Job) -> int:
    """Of the hidden states of all calibration tokens in front of one block."""
    if job.sequences is None:
        return 0
    return int(job.sequences.numel() * job.architecture.config.hidden_size * job.compute_dtype.itemsize)


def stage_bytes(job: Job, stage: int) -> int:
    """Of a stage of the artifact: 0 is the embedding, 1 ... L are the blocks, L + 1 the final norm and the head."""
    architecture = job.architecture
    if 0 < stage <= architecture.layers:
        return int(ROOM * _block_bytes(job, architecture.block(stage - 1)))
    modules = [architecture.embedding] if stage == 0 else [architecture.final_norm, *architecture.outer[1:]]
    shapes = architecture.module_shapes()
    return int(ROOM * sum(_matrix_bytes(job, name, f"{name}.weight", shapes[f"{name}.weight"]) for name in modules))


def check(job: Job) -> DiskPlan:
    """The plan, if the rest of it fits the disk. Raises ``NotEnoughDiskError`` with what is needed and what is free."""
    needed, folder = plan(job), job.work.folder
    done = all(job.work.done(f"weights {index}") is not None for index in range(job.architecture.layers))
    peak = max(needed.blocks, needed.publishing) if done else needed.peak
    there, free = folder_bytes(folder), free_bytes(folder)
    if (missing := peak - there - free) > 0:
        parts = f"{bytes_text(needed.artifact)} of artifact, {bytes_text(peak - needed.artifact)} of what is kept on the way"
        already = f", of which {bytes_text(there)} are there already" if there > peak // 100 else ""
        fewer = (
            "" if job.sequences is None else f", or give fewer {option('calibration_tokens', '--calibration-tokens')}"
        )
        raise NotEnoughDiskError(
            f"not enough room on the disk: the work in {folder} needs {bytes_text(rounded_up(peak))} at its peak ({parts})"
            f"{already}, and {bytes_text(free)} are free there. Free {bytes_text(rounded_up(missing))} more, choose an "
            f"output on another disk{fewer}",
            missing,
        )
    return needed


class DiskWatch:
    """Looks at the disk before each block: others fill it too."""

    def __init__(self, job: Job) -> None:
        self.job, self._told = job, False

    def before(self, index: int) -> None:
        """Raise ``NotEnoughDiskError`` where block ``index`` does not fit; tell once where those after it will not."""
        job, layers = self.job, self.job.architecture.layers
        free, activations = free_bytes(job.work.folder), activation_bytes(job) * (1 + job.follows_stream)
        own = stage_bytes(job, index + 1) + activations
        if own > free:
            raise NotEnoughDiskError(
                f"stopped before block {index} of {layers}: it needs {bytes_text(rounded_up(own))} on the disk, and "
                f"{bytes_text(free)} are free in {job.work.folder}. What is finished is kept. Free some space and run the "
                "same command again",
                own - free,
            )
        rest = own + sum(stage_bytes(job, stage + 1) for stage in range(index + 1, layers))
        if rest > free and not self._told:
            self._told = True
            job.progress.log(
                f"the blocks that are left need {bytes_text(rest)} on the disk, and {bytes_text(free)} are free in "
                f"{job.work.folder}: free some space, or the run stops on the way (and goes on later)"
            )


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(base, name).lstat().st_size
            except OSError:  # gone meanwhile
                continue
    return total


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that exists."""
    return shutil.disk_usage(folder).free


def _companion_bytes(job: Job) -> int:
    """Of tokenizer and configuration, and of what is written about linears."""
    weights = set(job.checkpoint.source.weight_files)
    return WORDS * len(job.plan) + sum(path.stat().st_size for path in job.checkpoint.files if path not in weights)


def _block_bytes(job: Job, block: BlockSpec) -> int:
    return sum(
        _matrix_bytes(job, (block.prefix + name).removesuffix(".weight"), block.sources_of(name)[0].tensor, shape)
        for name, shape in job.architecture.parameters(block.index).items()
    )


def _matrix_bytes(job: Job, module: str, source: str, shape: tuple[int, ...]) -> int:
    """Of one parameter: as codes where the plan says so, else as it lies in the tensor ``source``."""
    chosen: LinearPlan | None = job.plan.get(module)
    if chosen is None or not chosen.quantized:
        return math.prod(shape) * DTYPES[job.checkpoint.info(source).dtype].itemsize
    rows, columns = shape
    parts = codec_of(chosen.scheme).part_shapes((rows, columns)).values()
    return sum(math.prod(size) * dtype.itemsize for size, dtype in parts) + (-(-columns // 8) if chosen.rotation else 0)


def _kept_bytes(job: Job) -> int:
    """What the pass for token weights leaves until blocks are done: weights of tokens, and sums of gradients at outputs."""
    assert job.sequences is not None
    linears = sum(len(block.linears) for block in job.architecture.blocks)
    judges = min(MOST_JUDGES, -(-job.sequences.numel() // HELD_OUT))
    head = 4 * (job.architecture.config.hidden_size**2 + job.sequences.numel())
    sums = sum(
        4 * rows * ((rows + 1) // 2 + judges)
        for block in job.architecture.blocks
        for name in output_gradients.kept(job, block.index)
        if (rows := block.linear(name).shape[0])
    )
    return int(4 * job.sequences.numel() * linears + head + sums)
