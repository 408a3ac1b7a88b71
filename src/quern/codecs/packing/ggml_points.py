"""How points of a grid lie in ggml's super-blocks of 256 weights (``ggml-common.h`` of https://github.com/ggml-org/ggml).

Arrays here are ``(rows, super-blocks, n)``: numbers of points int64 with n = 32 (of 8 weights) or 64 (of 4); signs
uint8 with n = 32, a bit for each of 8 weights, the first lowest and 1 for below zero; whole numbers of scales uint8
with n = 8 or 16; the bytes of the float16 number, n = 2. Seven signs of eight are stored where their number is even.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEVEN = 127


def _bytes(words: Tensor, count: int) -> Tensor:
    """int64 words ``(..., n)`` as ``count`` little-endian bytes each, uint8 ``(..., count n)``."""
    shifts = 8 * torch.arange(count, device=words.device)
    return (words[..., None] >> shifts & 255).to(torch.uint8).flatten(-2)


def _joined(numbers: Tensor, each: int, bits: int) -> Tensor:
    """``each`` numbers of ``bits`` bits in one, the first lowest: int64 ``(..., n / each)``."""
    shifts = bits * torch.arange(each, device=numbers.device)
    return (numbers.long().view(*numbers.shape[:-1], -1, each) << shifts).sum(-1)


def _rows(*fields: Tensor) -> Tensor:
    return torch.cat(fields, dim=-1).flatten(1)


def _words(signs: Tensor, scales: Tensor) -> Tensor:
    """Of 32 weights a word: four times seven signs, and their scale above."""
    return _bytes(_joined(signs & SEVEN, 4, 7) | scales.long() << 28, 4)


def iq2_xxs(points: Tensor, signs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """66 bytes: float16, and of 32 weights four points of eight bits and a word of signs and scale."""
    pairs = [field.view(*d.shape[:2], 8, 4) for field in (_bytes(points, 1), _words(signs, scales))]
    return _rows(d, torch.cat(pairs, dim=-1).flatten(2))


def iq2_xs(points: Tensor, signs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """74 bytes: float16, points of nine bits with seven signs above, sixteen scales of four bits."""
    return _rows(d, _bytes(points | (signs & SEVEN).long() << 9, 2), _bytes(_joined(scales, 2, 4), 1))


def iq2_s(points: Tensor, signs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """82 bytes: float16, lower eight bits of the points, signs, their upper two bits, sixteen scales of four bits."""
    return _rows(d, _bytes(points, 1), signs, _bytes(_joined(points >> 8, 4, 2), 1), _bytes(_joined(scales, 2, 4), 1))


def iq3_xxs(points: Tensor, signs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """98 bytes: float16, points of eight bits, words of signs and scales."""
    return _rows(d, _bytes(points, 1), _words(signs, scales))


def iq3_s(points: Tensor, signs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """110 bytes: float16, lower eight bits of the points, their ninth bits, signs, eight scales of four bits."""
    return _rows(d, _bytes(points, 1), _bytes(_joined(points >> 8, 8, 1), 1), signs, _bytes(_joined(scales, 2, 4), 1))
