"""How much work the steps of a quantization are, in multiplications and additions: what the time left is foretold by.

A kind of blocks that was seen is foretold by what it took, so that only kinds that are still to come depend on these counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from quern.architectures.base import BlockSpec
from quern.core.machine.time_left import Work
from quern.pipeline.blockwise import output_gradients
from quern.pipeline.blockwise.job import Job
from quern.quantization.rounding.base import ROUNDINGS

ENCODING = 15_000
"""What finding the code of one weight takes, in the time of so many multiplications and additions of a float32 product.
Measured on AVX2 were 3,000 to 70,000 of the shipped recipes, and 400,000 of ggml's codebooks of 2 bits."""


def blocks(job: Job) -> list[Work]:
    """Of each block, rounding it and running it."""
    return [Work(_kind(job, block), _block(job, block)) for block in job.architecture.blocks]


def token_weights(job: Job) -> list[Work]:
    """Of each step of the pass for token weights: forward through all blocks, the head, and backward through all blocks."""
    tokens, architecture = _tokens(job), job.architecture
    forward = [2 * tokens * _weights(block) for block in architecture.blocks]
    kinds = [architecture.kind_of(block.index) for block in architecture.blocks]
    head = 6 * tokens * architecture.config.vocab_size * architecture.config.hidden_size
    # Backward: forward again, the gradient of the inputs, and, where they are added up, products of those of the outputs.
    sums = [
        tokens * sum(block.linear(name).shape[0] ** 2 for name in output_gradients.kept(job, block.index))
        for block in architecture.blocks
    ]
    backward = [2 * size + more for size, more in zip(forward, sums, strict=True)]
    return [
        *(Work(("forward", kind), size) for kind, size in zip(kinds, forward, strict=True)),
        Work("head", head),
        *(Work(("backward", kind), size) for kind, size in reversed(list(zip(kinds, backward, strict=True)))),
    ]


def _kind(job: Job, block: BlockSpec) -> tuple[object, ...]:
    """Blocks of one kind have the same shapes and are stored alike."""
    plans = tuple(job.plan[block.prefix + linear.name].scheme for linear in block.linears)
    return job.architecture.kind_of(block.index), plans


def _block(job: Job, block: BlockSpec) -> float:
    tokens, streams = _tokens(job), 1 + job.follows_stream
    run, before, rounding = _weights(block), 0, 0
    for stage in block.stages:
        names = [name for group in stage for name in group.linears]
        if any(job.plan[block.prefix + name].quantized for name in names):
            run += before  # what it reads is captured, by a run that ends there
        before += _met(block, names)
    passes = 2 * tokens * streams * run
    for linear in block.linears:
        rows, columns = linear.shape
        plan = job.plan[block.prefix + linear.name]
        if not plan.quantized:
            continue
        rounding += ENCODING * rows * columns
        if ROUNDINGS.get(plan.rounding.method).needs_hessian:
            # A Hessian, its factor, and the feedback: one product for each half of the matrix, and one for each sweep.
            met = tokens if linear.expert is None else tokens * block.experts_per_token // block.experts
            rounding += met * columns**2 + columns**3 // 3 + (1 + plan.rounding.sweeps) * rows * columns**2
    return float(passes + rounding)


def _weights(block: BlockSpec) -> int:
    return _met(block, [linear.name for linear in block.linears])


def _met(block: BlockSpec, names: Sequence[str]) -> int:
    """Weights of some linears that a token meets, of experts' on average."""
    linears = [block.linear(name) for name in names]
    every = sum(one.shape[0] * one.shape[1] for one in linears if one.expert is None)
    routed = sum(one.shape[0] * one.shape[1] for one in linears if one.expert is not None)
    return every + (routed * block.experts_per_token // block.experts if block.experts else 0)


def _tokens(job: Job) -> int:
    return 0 if job.sequences is None else job.sequences.numel()
