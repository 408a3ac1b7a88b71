"""How codes lie in ggml's super-blocks of 256 weights (``ggml-common.h`` of https://github.com/ggml-org/ggml).

Arrays here are ``(rows, super-blocks, n)``: codes uint8 with n = 256; whole numbers of sub-scales and minimums uint8 (signed
ones plus half their range) with n = 8 or 16; scales as the bytes of float16, n = 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Weights of a super-block."""


def _planes(codes: Tensor, width: int) -> Tensor:
    """Codes as ``(rows, super-blocks, runs, 32)``, ``width`` of which lie behind each other in the same 32 bytes."""
    return codes.view(*codes.shape[:2], BLOCK // (32 * width), width, 32)


def _stacked(codes: Tensor, bits: int) -> Tensor:
    """The lowest ``bits`` of codes, those of 8 / ``bits`` runs of 32 above each other in 32 bytes."""
    runs = _planes(codes & (1 << bits) - 1, 8 // bits)
    stacked = runs[..., 0, :].clone()
    for place in range(1, 8 // bits):
        stacked |= runs[..., place, :] << bits * place
    return stacked.flatten(2)


def _bit_planes(bit: Tensor) -> Tensor:
    """Single bits of 256 codes: bit i of byte l belongs to code 32 i + l."""
    weights = (1 << torch.arange(8, device=bit.device)).to(torch.uint8)
    return (bit.view(*bit.shape[:2], 8, 32) * weights[:, None]).sum(2, dtype=torch.uint8)


def _six_bit_pairs(scales: Tensor, minimums: Tensor) -> Tensor:
    """Eight scales and eight minimums of six bits in twelve bytes, as Q4_K and Q5_K have them."""
    first = scales[..., :4] | scales[..., 4:] >> 4 << 6
    second = minimums[..., :4] | minimums[..., 4:] >> 4 << 6
    third = scales[..., 4:] & 15 | (minimums[..., 4:] & 15) << 4
    return torch.cat([first, second, third], dim=-1)


def _six_bit_scales(scales: Tensor) -> Tensor:
    """Sixteen scales of six bits in twelve bytes, as Q3_K has them."""
    low = scales[..., :8] & 15 | (scales[..., 8:] & 15) << 4
    quarters = (scales >> 4).view(*scales.shape[:2], 4, 4)
    high = quarters[..., 0, :].clone()
    for place in range(1, 4):
        high |= quarters[..., place, :] << 2 * place
    return torch.cat([low, high], dim=-1)


def _rows(*fields: Tensor) -> Tensor:
    return torch.cat(fields, dim=-1).flatten(1)


def q2_k(codes: Tensor, scales: Tensor, minimums: Tensor, d: Tensor, d_min: Tensor) -> Tensor:
    """84 bytes: sixteen scales and minimums of four bits, codes, both float16 numbers."""
    return _rows(scales | minimums << 4, _stacked(codes, 2), d, d_min)


def q3_k(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """110 bytes: third bits, the lower two, scales of six bits, float16."""
    return _rows(_bit_planes(codes >> 2), _stacked(codes, 2), _six_bit_scales(scales), d)


def q4_k(codes: Tensor, scales: Tensor, minimums: Tensor, d: Tensor, d_min: Tensor) -> Tensor:
    """144 bytes: both float16 numbers, eight scales and minimums, codes."""
    return _rows(d, d_min, _six_bit_pairs(scales, minimums), _stacked(codes, 4))


def q5_k(codes: Tensor, scales: Tensor, minimums: Tensor, d: Tensor, d_min: Tensor) -> Tensor:
    """176 bytes: as Q4_K, with the fifth bits before the lower four."""
    return _rows(d, d_min, _six_bit_pairs(scales, minimums), _bit_planes(codes >> 4), _stacked(codes, 4))


def q6_k(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """210 bytes: lower four bits, upper two, sixteen scales of eight bits, float16.

    Of 128 codes those of the first and third, and of the second and fourth run of 32 share bytes in the first field.
    """
    runs = codes.view(*codes.shape[:2], 2, 4, 32)
    low = runs[..., :2, :] & 15 | (runs[..., 2:, :] & 15) << 4
    return _rows(low.flatten(2), _stacked(codes >> 4, 2), scales ^ 0x80, d)


def iq4_xs(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """136 bytes: float16, upper two bits of eight scales, their lower four, codes in blocks of 32 as IQ4_NL has them."""
    quarters = (scales >> 4).view(*scales.shape[:2], 2, 4)
    high = quarters[..., 0].clone()
    for place in range(1, 4):
        high |= quarters[..., place] << 2 * place
    low = scales[..., 0::2] & 15 | (scales[..., 1::2] & 15) << 4
    halves = codes.view(*codes.shape[:2], 8, 2, 16)
    return _rows(d, high, low, (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(2))
