"""Products of bfloat16 and float16 matrices on processors that have no instructions for them.

Below AVX-512, torch multiplies such matrices number by number, six to ten times as slowly as float32 ones. There they become
float32, slab by slab; products of such numbers are exact in float32, and sums are rounded at the end, as the instructions
of other processors do it.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

SLAB_ENTRIES = 1 << 22
"""Weights that are float32 at a time, in each thread: 16 MiB, which a processor's last cache may hold."""
HALF = (torch.bfloat16, torch.float16)


@functools.cache
def multiplies_half() -> bool:
    """Whether torch is left to multiply bfloat16 and float16 on this processor."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not x86 or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX", "AVX2")


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: ``(..., columns)`` times the transpose of ``(rows, columns)``, in their dtype."""
    if inputs.dtype not in HALF or weight.dtype != inputs.dtype or inputs.device.type != "cpu" or multiplies_half():
        return functional.linear(inputs, weight, bias)
    product: Tensor = _Product.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return product


class Linear(nn.Linear):
    """An ``nn.Linear`` that computes by ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_products(model: nn.Module) -> None:
    """Let every ``nn.Linear`` of ``model`` compute by ``linear``; weights, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


class _Product(torch.autograd.Function):
    """``inputs @ weight.T + bias``; keeps inputs and weight as they are for the way back."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(inputs, weight)
        known, found = inputs.float(), inputs.new_empty(*inputs.shape[:-1], len(weight))
        for slab, rows in _slabs(weight):
            found[..., rows] = functional.linear(known, slab.float(), None if bias is None else bias[rows].float())
        return found

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = context.saved_tensors
        into, known = gradient.reshape(-1, len(weight)), inputs.reshape(-1, weight.shape[1]).float()
        for_inputs, for_weight, for_bias = context.needs_input_grad
        of_inputs = torch.zeros_like(known) if for_inputs else None
        of_weight = torch.empty_like(weight) if for_weight else None
        for slab, rows in _slabs(weight):
            part = into[:, rows].float()
            if of_inputs is not None:
                of_inputs.addmm_(part, slab.float())
            if of_weight is not None:
                of_weight[rows] = (part.T @ known).to(weight.dtype)
        return (
            None if of_inputs is None else of_inputs.to(inputs.dtype).view(inputs.shape),
            of_weight,
            into.float().sum(0).to(gradient.dtype) if for_bias else None,
        )


def _slabs(weight: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Rows of ``weight``, and which they are."""
    step = max(1, SLAB_ENTRIES // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield weight[rows], rows
