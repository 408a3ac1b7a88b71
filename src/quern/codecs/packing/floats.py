"""How floating-point codes lie in compressed-tensors 0.20 (https://github.com/vllm-project/compressed-tensors)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatForm:
    """What its configuration says of a matrix."""

    format: str
    """Name of the compressed form, such as ``float-quantized``."""
    bits: int
    strategy: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale under the strategy ``block``."""
    scale_dtype: str | None = None
    joined_scale: bool = False
    """Whether a scale of the whole matrix is one of those that vLLM joins into one, too."""

    def arguments(self) -> dict[str, Any]:
        """The weights' entry of a config group."""
        return {
            "num_bits": self.bits,
            "type": "float",
            "symmetric": True,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None if self.block is None else list(self.block),
            "observer": "minmax",
            "observer_kwargs": {},
            "scale_dtype": self.scale_dtype,
            "zp_dtype": None,
        }


def nibble_bytes(words: Tensor, columns: int) -> Tensor:
    """Words int32 ``(rows, n)`` of 4-bit codes, low nibble first, as bytes uint8 ``(rows, columns / 2)``."""
    return words.contiguous().view(torch.uint8)[:, : columns // 2].contiguous()
