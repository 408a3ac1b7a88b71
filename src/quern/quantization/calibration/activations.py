"""Activations on disk: hidden states of all calibration sequences, read and written a few sequences at a time.

They are never held whole in memory, so the peak depends neither on how many tokens nor on how many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor

from quern.checkpoint.files import InputFile, atomic_output
from quern.core.machine.parallel import Workers, pieces

WAVE_TOKENS = 2048
"""Tokens in memory at a time. Part of the definition of the results: sums are added up wave by wave."""


@dataclass(frozen=True)
class ActivationFile:
    """Hidden states ``(sequences, time, width)`` of one dtype in a file without a header."""

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def waves(self) -> list[tuple[int, int]]:
        """The sequences as ``(start, stop)`` of about ``WAVE_TOKENS`` tokens."""
        return pieces(self.shape[0], max(1, WAVE_TOKENS // self.shape[1]))

    def read(self, start: int, stop: int) -> Tensor:
        """Sequences ``[start, stop)``: ``(stop - start, time, width)``. Raises ``BadFileError``."""
        tensor = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        with InputFile(self.path) as file:
            file.fill(tensor.reshape(-1).view(torch.uint8).numpy().data, start * tensor[0].nbytes)
        return tensor

    def write(self, wave: Callable[[int, int], Tensor], workers: Workers | None = None) -> None:
        """Write every wave in order, which ``workers`` may make ahead; the file appears when all are there. Raises
        ``UserError`` for a full disk."""
        waves = starmap(wave, self.waves()) if workers is None else workers.ahead(wave, self.waves())
        self.write_all(waves)

    def write_all(self, waves: Iterable[Tensor]) -> None:
        """``write`` of waves that are made one after the other."""
        sequences, time, width = self.shape
        with atomic_output(self.path, sequences * time * width * self.dtype.itemsize) as file:
            for wave in waves:
                file.write(wave.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy().data)
