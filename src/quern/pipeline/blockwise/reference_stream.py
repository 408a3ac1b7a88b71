"""The stream of the unquantized model beside that of the quantized one: what targets that make up for drift are taken from,
and what tuning aims at.

A block as the transforms left it computes what the checkpoint's does, in the coordinates in which its linears are rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quern.pipeline.blockwise import output_gradients, sensitivity
from quern.pipeline.blockwise.job import Job
from quern.quantization.calibration.block import Block, Tap
from quern.quantization.calibration.drift import HELD_OUT, Reference
from quern.quantization.calibration.outputs import OutputStatistics, bytes_of

STREAM = "unquantized"


def start_stream(job: Job) -> None:
    """Inputs of the first block: the embedding as it is."""
    if job.sequences is None or job.work.done(f"{STREAM} 0") is not None or job.work.done("block 0") is not None:
        return
    table, sequences = job.read(f"{job.architecture.embedding}.weight"), job.sequences
    store = job.activations(STREAM, 0)
    store.write(lambda start, stop: table[sequences[start:stop]])
    job.work.finish(f"{STREAM} 0", [store.path], {})


class ReferenceStream:
    """One block of it, while the other block of this index is rounded."""

    def __init__(self, job: Job, block: Block) -> None:
        """``block``: with its transforms, before anything is rounded."""
        self.job, self.index = job, block.spec.index
        self.source, self.outputs = job.activations(STREAM, self.index), job.activations(STREAM, self.index + 1)
        self.block = copy.copy(block)
        self.block.module = copy.deepcopy(block.module)
        self._outputs: dict[str, OutputStatistics] = {}

    def weight(self, linear: str) -> Tensor:
        """The weight of the linear called ``linear``, relative to the block."""
        return self.block.linear(linear).weight.data

    def capture(self, linears: Sequence[str], others: Sequence[str], start: int, stop: int) -> dict[str, Tap]:
        """See ``Block.capture``; of sequences ``[start, stop)``."""
        return self.block.capture(linears, self.source.read(start, stop), self.job.workers, others)

    def output_statistics(self, linears: Sequence[str], wanted: Sequence[str]) -> dict[str, OutputStatistics]:
        """See ``sensitivity.output_statistics``; of ``linears``, and where they are small of all in the block that are
        ``wanted``, in one pass, if not from the one that made the token weights."""
        if (known := output_gradients.kept(self.job, self.index)) and not self._outputs and linears:
            self._outputs = output_gradients.read(
                self.job, self.index, {name: self.block.linear(name).out_features for name in known}
            )
        if not all(name in self._outputs for name in linears):
            size = sum(bytes_of(self.block.linear(name).out_features) for name in wanted)
            some = wanted if size <= output_gradients.AT_ONCE else linears
            self._outputs |= sensitivity.output_statistics(self.job, self.block, some)
        return {name: self._outputs.pop(name) for name in linears}

    def forget_block(self) -> None:
        """Let the block go, of which nothing but files is wanted any more."""
        del self.block

    def end(self) -> None:
        """The block is done: nobody needs what led to it any more."""
        self.source.path.unlink(missing_ok=True)
        if self.index + 1 == self.job.architecture.layers:
            self.outputs.path.unlink(missing_ok=True)
        sensitivity.forget(self.job, self.index)

    def write_next(self) -> None:
        """What the block makes of its inputs, for the next one; of the last block only where tuning aims at it."""
        last = self.index + 1 == self.job.architecture.layers
        if not self.job.follows_stream or (last and self.job.recipe.tuning is None):
            return
        workers = self.job.workers
        with self.block.lent(workers):
            self.outputs.write(lambda start, stop: self.block.run_each(self.source.read(start, stop), workers), workers)
        self.job.work.finish(f"{STREAM} {self.index + 1}", [self.outputs.path], {})


def references(
    linears: Sequence[str], block: Block, own: Mapping[str, Tap], unquantized: Mapping[str, Tap], first: int
) -> dict[str, Reference]:
    """Of each of ``linears``, which read the same input, what the two streams' taps say; ``first``: the first sequence."""
    tap = unquantized[linears[0]]
    time = block.time
    held = (first + torch.arange(tap.length) // time) % HELD_OUT == HELD_OUT - 1
    found = {}
    for name in linears:
        place = block.spec.linear(name).added_to
        added = None if place is None else unquantized[place].inputs.float() - own[place].inputs.float()
        found[name] = Reference(tap.inputs, added, held.to(tap.inputs.device))
    return found
