"""The rotation of inputs that stored weights may ask for: signs, then a block Hadamard transform.

Both are orthogonal, so a linear computes the same if its inputs and the rows of its weight are rotated alike. Outliers are
spread over all columns of a block, and what is rounded looks Gaussian (Chee et al. 2023 (QuIP), arXiv 2307.13304; Tseng et
al. 2024 (QuIP#), arXiv 2402.04396, section 3). Blocks are the largest power of two that divides the number of columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from quern import _native
from quern.core.machine.parallel import pieces

ROWS = 256
"""Rows transformed at a time, so that all passes over them find them in the cache."""


def block_size(columns: int) -> int:
    """The largest power of two that divides ``columns``."""
    return columns & -columns


def pack_signs(negative: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Tensor:
    """Signs ``(columns,)`` as uint8 ``(ceil(columns / 8),)``: bit i % 8 of byte i // 8 is set where column i turns."""
    return torch.from_numpy(np.packbits(negative, bitorder="little"))


def unpack_signs(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack_signs`` as factors, float32 ``(columns,)``: -1 where the bit is set, else 1."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[:columns].float()


def hadamard(values: Tensor) -> Tensor:
    """The orthonormal block Hadamard transform of float32 ``(rows, columns)``, its own inverse.

    ``values`` may be overwritten.
    """
    columns = values.shape[-1]
    size = block_size(columns)
    width = 1
    while width < size:
        pairs = values.view(-1, columns // (2 * width), 2, width)
        values = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        width *= 2
    return values.reshape(-1, columns).mul_(size**-0.5)


def rotate(values: Tensor, packed_signs: Tensor) -> Tensor:
    """``values`` ``(..., columns)`` rotated, float32: every column times its sign, then ``hadamard``."""
    if _has_kernel(values):
        return _by_kernel(values, packed_signs)
    signs = unpack_signs(packed_signs.to(values.device), values.shape[-1])
    return _by_rows(values, lambda rows: hadamard(rows.float() * signs))


def rotate_back(values: Tensor, packed_signs: Tensor) -> Tensor:
    """The inverse of ``rotate``, float32."""
    signs = unpack_signs(packed_signs.to(values.device), values.shape[-1])
    if _has_kernel(values):
        return _by_kernel(values, torch.zeros_like(packed_signs)).mul_(signs)
    return _by_rows(values, lambda rows: hadamard(rows.float().clone()).mul_(signs))


def _has_kernel(values: Tensor) -> bool:
    """Whether ``values`` lie where the kernel can read them, and no gradient is to go through."""
    return values.device.type == "cpu" and not (values.requires_grad and torch.is_grad_enabled())


def _by_kernel(values: Tensor, packed_signs: Tensor) -> Tensor:
    """``rotate`` by the engine's kernel, which adds in the same order (a test compares) and passes over memory once."""
    flat = values.detach().reshape(-1, values.shape[-1]).float().contiguous()
    return torch.from_numpy(_native.rotate(flat.numpy(), packed_signs.numpy(), 1)).view(values.shape)


def _by_rows(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    flat = values.reshape(-1, values.shape[-1])
    result = torch.empty(flat.shape, dtype=torch.float32, device=values.device)
    for start, stop in pieces(len(flat), ROWS):
        result[start:stop] = function(flat[start:stop])
    return result.view(values.shape)
