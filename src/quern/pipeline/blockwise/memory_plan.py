"""What a quantization will need at its peak, said before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import psutil

from quern.architectures.base import BlockSpec, LinearGroup, LinearSpec
from quern.checkpoint.safetensors_file import DTYPES
from quern.core.errors import OutOfMemoryCapError, option
from quern.core.text.units import bytes_text, rounded_up
from quern.pipeline.blockwise import sensitivity
from quern.pipeline.blockwise.job import Job
from quern.pipeline.blockwise.output_gradients import AT_ONCE, recomputes
from quern.quantization.calibration.activations import WAVE_TOKENS
from quern.quantization.calibration.drift import MOST_JUDGES
from quern.quantization.calibration.outputs import bytes_of
from quern.quantization.calibration.token_weights import LOGIT_TOKENS
from quern.quantization.rounding.base import SLAB
from quern.quantization.rounding.factor import TILE
from quern.quantization.training.student import HANDED_ON_TOGETHER

MIB = 1 << 20
SLAB_COPIES = 8
"""Float32 copies of a slab that rounding one keeps: the slab, its changes, its codes, the observer's candidates."""
STATE_COPIES = 3
"""Float32 numbers for each latent weight in tuning: itself and both moments of Adam."""
GRAPH_COPIES = 24
"""Float32 copies of a matrix while its gradient is handed on to its latent weights, scales and codes: up to 22 were measured
of integers with zero points, and some memory stays with the threads that made the gradients."""
ACTIVATION_COPIES = 24
"""Copies of a sequence's widest activations that a block keeps for its backward pass."""
WAVE_COPIES = 4
"""Float32 copies of a wave's widest activations."""
ORDERED = 4096
"""Rows of the largest Hessian of outputs that is copied: those of more are factorized where they are."""
LIBRARIES = 64 * MIB
"""What torch's libraries take when they first compute and what the allocator keeps: 20 to 50 MiB were measured."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of each stage; ``process`` is what it takes already, and its libraries will."""

    process: int
    block: int
    outer: int
    sensitivity: int

    @property
    def peak(self) -> int:
        """The greatest of the stages."""
        return self.process + max(self.block, self.outer, self.sensitivity)


def plan(job: Job, further_hessians: int = 0) -> MemoryPlan:
    """Estimate the peak from the model's shapes and the recipe; with so many more Hessians of the widest linear."""
    itemsize, drift = job.compute_dtype.itemsize, job.follows_drift
    shapes = [linear.shape for block in _kinds(job) for linear in block.linears]
    widest, largest = max(columns for _, columns in shapes), max(rows * columns for rows, columns in shapes)
    entries = max(sum(rows * columns for rows, columns in _shapes(block.linears)) for block in _kinds(job))
    weights = entries * itemsize
    if job.follows_stream or job.two_sided:
        weights *= 2  # the block as it was before anything of it was rounded
    further = further_hessians * 4 * widest**2
    calibrated = job.sequences is not None
    # A rotated copy of the activations comes on top.
    wave = (WAVE_COPIES + job.recipe.rotated + 2 * drift) * 4 * WAVE_TOKENS * widest if calibrated else 0
    if calibrated:
        wave += max(_routed(block) for block in _kinds(job)) * itemsize * WAVE_TOKENS
    wave *= job.workers.waves_at_once
    slabs = job.workers.threads * SLAB_COPIES * 4 * SLAB * widest
    # Codes of the linears done so far, and the rounded copy of the one in hand.
    packed = entries + largest * (itemsize + 1)
    uses_hessian = calibrated and job.uses_hessians
    table = job.architecture.config.vocab_size * job.architecture.config.hidden_size
    # Of embedding or head: the weight, its rounded slabs and these joined; the codes, in slabs and joined.
    stored = DTYPES[job.checkpoint.info(f"{job.architecture.embedding}.weight").dtype].itemsize
    outer = table * stored
    if job.recipe.embedding.quantized or job.recipe.head.quantized:
        hidden = job.architecture.config.hidden_size
        outer = table * (3 * stored + 2) + job.workers.threads * SLAB_COPIES * 4 * SLAB * hidden
        outer += 3 * 4 * hidden**2  # the head's Hessian: as it was kept, to be factorized, and for sweeps
    # Gradients at outputs that the pass backwards adds up, and their copy on the way to the disk.
    kept = 2 * AT_ONCE if job.two_sided and not recomputes(job) else 0
    stages = [(kind, stage) for kind in _kinds(job) for stage in kind.stages] if uses_hessian else []
    # What is known grows while waves go through the block, of two-sided rounding backwards, too; then linears are rounded.
    seen = [_known(job, kind, stage) + further for kind, stage in stages]
    rounding = [known + _copies(job, kind, stage) for known, (kind, stage) in zip(seen, stages, strict=True)]
    waves = (1 + uses_hessian + job.two_sided) * wave
    block = weights + packed + max(waves + max(seen, default=0), slabs + max(rounding, default=0))
    if job.recipe.tuning is not None:
        block = max(block, *(_tuning(job, kind) + entries * (itemsize + 1) for kind in _kinds(job)))
    fisher = sensitivity.needed(job) and calibrated
    # A number for each token and linear, once more while they are written or normalized.
    tokens = job.sequences.numel() if fisher and job.sequences is not None else 0
    counted = 8 * tokens * max(len(kind.linears) for kind in _kinds(job))
    logits = job.workers.threads * 5 * 4 * LOGIT_TOKENS * job.architecture.config.vocab_size
    return MemoryPlan(
        process=psutil.Process().memory_info().rss + LIBRARIES,
        block=block + counted,
        outer=outer,
        sensitivity=max(table * (4 + itemsize) + logits, weights + 3 * wave + kept + counted) if fisher else 0,
    )


def within(job: Job, cap: int | None, further_hessians: int = 0) -> Job:
    """``job`` with the Hessians of experts in batches that leave room for all else under a ``cap`` of memory."""
    if cap is None:
        return job
    least = replace(job, hessian_bytes=0)
    return replace(job, hessian_bytes=min(job.hessian_bytes, max(0, cap - plan(least, further_hessians).peak)))


def _routed(block: BlockSpec) -> int:
    """Numbers that experts read of a token, twice: as each of them reads them, and joined for each linear."""
    return (
        2 * block.experts_per_token * max((one.shape[1] for one in block.linears if one.expert is not None), default=0)
    )


def _kinds(job: Job) -> list[BlockSpec]:
    """A block of every kind."""
    architecture = job.architecture
    return list({architecture.kind_of(block.index): block for block in reversed(architecture.blocks)}.values())


def _shapes(linears: Iterable[LinearSpec]) -> list[tuple[int, int]]:
    return [linear.shape for linear in linears]


def _known(job: Job, block: BlockSpec, stage: Sequence[LinearGroup]) -> int:
    """Bytes of what is known of the linears of one stage while they are rounded."""
    groups = [[block.linear(name) for name in group.linears] for group in stage]
    own = job.recipe.calibration.token_weight == "fisher"
    sizes = [(len(group) if own else 1) * 4 * group[0].shape[1] ** 2 for group in groups]
    # Those of experts come in batches.
    found = sum(sizes) if groups[0][0].expert is None else min(sum(sizes), max(job.hessian_bytes, *sizes))
    if any(linear.rounding.sweeps for linear in job.plan.quantized().values()):
        # The whole of one lies where its factor is, but for the tiles of its diagonal; in another order it is a copy.
        widest = max(group[0].shape[1] for group in groups)
        ordered = any(linear.rounding.activation_order for linear in job.plan.quantized().values())
        found += 4 * widest * (widest if ordered else min(widest, TILE))
    if job.follows_drift:
        # Of what would make up for drift, and the tokens that judge, for linears that every token meets.
        met = _shapes(linear for group in groups for linear in group if linear.expert is None)
        found += sum(4 * rows * columns + 4 * MOST_JUDGES * (rows + columns) for rows, columns in met)
    if job.two_sided:
        every = sum(bytes_of(rows) for rows, _ in _shapes(block.linears))
        most = max(sum(bytes_of(rows) for rows, _ in _shapes(group)) for group in groups)
        found += most + (every if every <= AT_ONCE else 0)
    return found


def _copies(job: Job, block: BlockSpec, stage: Sequence[LinearGroup]) -> int:
    """Bytes that rounding one of the linears of a stage needs beside that: of two-sided rounding the copies in which
    Hessians of outputs are put in order and factorized, the errors of the rows that are done and what they decode to."""
    if not job.two_sided:
        return 0
    shapes = [block.linear(name).shape for group in stage for name in group.linears]
    return max(4 * (3 * min(rows, ORDERED) ** 2 + 2 * rows * columns) for rows, columns in shapes)


def _tuning(job: Job, block: BlockSpec) -> int:
    """Bytes of what tuning a block needs beside its weights and codes.

    Either sequences run, each with gradients of all weights in the arithmetic of the pass, or sums of these are handed on,
    matrix by matrix.
    """
    assert job.recipe.tuning is not None
    assert job.sequences is not None
    itemsize, threads = job.compute_dtype.itemsize, job.workers.threads
    shapes = [linear.shape for linear in block.linears if job.plan[block.prefix + linear.name].quantized]
    entries = [rows * columns for rows, columns in shapes] or [0]
    widest = max(max(linear.shape) for linear in block.linears)
    tuning = job.recipe.tuning
    states = STATE_COPIES if tuning.train == "codes" or tuning.between else 0
    before = itemsize * sum(entries) if tuning.train == "codes" and tuning.between else 0
    runs = (1 + threads) * itemsize * sum(entries) + threads * ACTIVATION_COPIES * itemsize * job.sequences.shape[
        1
    ] * widest
    graphs = 4 * GRAPH_COPIES * max(max(entries), threads * min(max(entries), HANDED_ON_TOGETHER)) + 4 * sum(entries)
    return before + 4 * (states + 1) * sum(entries) + max(runs, graphs)


def check(job: Job, cap: int | None, further_hessians: int = 0) -> MemoryPlan:
    """The plan, if it fits ``cap`` bytes. Raises ``OutOfMemoryCapError`` with the least that would do."""
    needed = plan(job, further_hessians)
    if cap is not None and needed.peak > cap:
        least = bytes_text(rounded_up(needed.peak))
        enough = option(f"memory={rounded_up(needed.peak):_}", f"--memory {least.replace(' ', '')}")
        less = f"fewer {option('threads', '--threads')}"
        if job.uses_hessians:
            less += ", or a recipe with rounding: nearest"
        if job.recipe.tuning is not None:
            less += ", or one without tuning" if job.recipe.tuning.train == "scales" else ", or tuning: {train: scales}"
        raise OutOfMemoryCapError(
            f"a memory cap of {bytes_text(cap)} is too small: one decoder block of this model with recipe "
            f"{job.recipe.name!r} needs {least}. Give at least {enough}, or {less}",
            needed.peak,
        )
    if job.workers.elsewhere:
        job.workers.reserve(_piece(job, needed.process), cap)
    return needed


def _piece(job: Job, process: int) -> int:
    """Bytes that a process takes which carries out pieces, with what it shares with others of its machine."""
    itemsize = job.compute_dtype.itemsize
    blocks = [_shapes(block.linears) for block in _kinds(job)]
    widest = max(columns for shapes in blocks for _, columns in shapes)
    largest = max(rows * columns for shapes in blocks for rows, columns in shapes)
    rounding = largest * itemsize + SLAB_COPIES * 4 * SLAB * widest
    if job.sequences is None:
        return process + rounding
    rounding += 4 * widest * (widest + min(widest, TILE)) if job.uses_hessians else 0
    counting = 4 * widest * (TILE + 3 * WAVE_TOKENS)
    copies = ACTIVATION_COPIES if sensitivity.needed(job) else WAVE_COPIES
    weights = max(sum(rows * columns for rows, columns in shapes) for shapes in blocks) * itemsize
    return process + max(rounding, counting, weights + copies * 4 * job.sequences.shape[1] * widest)
