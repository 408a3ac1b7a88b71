"""What the unquantized model makes of the training text: its final hidden states, computed once, block by block, on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.core.machine.heap import release_freed
from quern.core.machine.parallel import Workers
from quern.core.progress import Progress
from quern.quantization.calibration.activations import ActivationFile
from quern.quantization.calibration.block import Block

TEACHER = "teacher"


@dataclass(frozen=True)
class Teacher:
    """The unquantized model on some sequences."""

    checkpoint: Checkpoint
    architecture: Architecture
    sequences: Tensor
    """int64 ``(sequences, time)``."""
    dtype: torch.dtype
    work: WorkFolder
    workers: Workers

    def _file(self, index: int) -> ActivationFile:
        shape = (*self.sequences.shape, self.architecture.config.hidden_size)
        return ActivationFile(self.work.path(TEACHER, f"{index:04d}.bin"), shape, self.dtype)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name, finite=True)

    def run(self, progress: Progress) -> None:
        """All blocks that are not done yet. Each leaves its outputs, and its inputs go."""
        layers, time = self.architecture.layers, self.sequences.shape[1]
        done = max((n for n in range(layers + 1) if self.work.done(f"{TEACHER} {n}") is not None), default=-1)
        task = progress.task("teacher", layers, max(done, 0))
        if done < 0:
            embedding = self._read(f"{self.architecture.embedding}.weight")
            self._file(0).write(lambda start, stop: embedding[self.sequences[start:stop]])
            del embedding
            self._finished(0)
        for index in range(max(done, 0), layers):
            block = Block(self.architecture, index, self._read, self.dtype, time)
            source, following = self._file(index), self._file(index + 1)

            def wave(start: int, stop: int, block: Block = block, source: ActivationFile = source) -> Tensor:
                return block.run_each(source.read(start, stop), self.workers)

            following.write(wave)
            self._finished(index + 1)
            release_freed()
            task.advance()
        task.done()

    def _finished(self, index: int) -> None:
        self.work.finish(f"{TEACHER} {index}", [self._file(index).path], {})
        if index:
            self._file(index - 1).path.unlink(missing_ok=True)

    def hidden(self, place: int) -> Tensor:
        """Final hidden states ``(time, width)`` of a sequence, once ``run`` has ended."""
        return self._file(self.architecture.layers).read(place, place + 1)[0]
