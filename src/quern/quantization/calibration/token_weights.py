"""Fisher token weights: how much each token matters to each linear.

Token t counts in linear l's Hessian with the squared norm of the loss's gradient at that linear's output,
|dL / dy_t|^2, where L is the cross entropy against a token drawn from the model's own prediction. This is the
block-diagonal Fisher information with the output side summed up (compare GuidedQuant, Kim et al. 2025,
arXiv 2505.07004, and YAQA, Tseng et al. 2025, arXiv 2505.22988, which keep more of it).

It streams: the pass below needs the inputs of one block and the gradient of its outputs at a time, and leaves one number
for each token and linear.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quern.core.machine import products
from quern.core.machine.parallel import pieces
from quern.core.seeds import derive_seed
from quern.quantization.calibration.block import Block

LOGIT_TOKENS = 256
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class OutputGradient:
    """What one sequence gives behind the last block."""

    hidden: Tensor
    """dL/d(hidden states that leave the last block), float32 ``(time, width)``."""
    inputs: Tensor
    """What the head reads ``(time, width)``."""
    squares: Tensor
    """|dL/d(logits)|^2, float32 ``(time,)``."""


def output_gradient(hidden: Tensor, norm: nn.Module, head: Tensor, seed: int) -> OutputGradient:
    """For one sequence of hidden states ``(time, width)`` that leave the last block.

    ``head`` is the output matrix ``(vocabulary, width)``. L sums over the tokens; the label of each is drawn from the
    model's prediction at that place, seeded by ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(hidden.shape[0], 1, generator=generator).to(head.device)
    gradients, inputs, squares = [], [], []
    for start, stop in pieces(hidden.shape[0], LOGIT_TOKENS):
        part = hidden[start:stop].to(head.device).detach().requires_grad_()
        with torch.enable_grad():
            final = norm(part)
        # The gradient of the cross entropy by the logits is (prediction - label), so the logits need no graph.
        prediction = products.linear(final.detach(), head).float().softmax(-1)
        cumulative = prediction.cumsum(-1)
        labels = torch.searchsorted(cumulative, uniform[start:stop] * cumulative[:, -1:])
        labels.clamp_(max=head.shape[0] - 1)
        prediction.scatter_add_(1, labels, torch.full_like(cumulative[:, :1], -1.0))
        (gradient,) = torch.autograd.grad(final, part, products.linear(prediction.to(head.dtype), head.T))
        gradients.append(gradient.float())
        inputs.append(final.detach())
        squares.append(prediction.square().sum(-1))
    return OutputGradient(torch.cat(gradients), torch.cat(inputs), torch.cat(squares))


@dataclass(frozen=True)
class BlockGradients:
    """What one sequence gives, backwards through a block."""

    squares: Tensor
    """|dL/dy_t|^2, float32 ``(recorded linears, time)``."""
    rows: list[Tensor]
    """For each recorded linear sum_t (dL/dy_ti)^2, float32 ``(rows,)``."""
    sampled: list[Tensor]
    """For each recorded linear dL/dy_ti of the rows that were asked for, float32 ``(time, sampled rows)``; 0 for tokens that
    did not meet it."""
    inputs: Tensor
    """dL/d(inputs of the block) ``(time, width)``."""
    outputs: list[Tensor]
    """dL/dy_t of the linears of which it was asked for, float32 ``(tokens that met it, rows)``."""


def output_gradients(block: Block, hidden: Tensor, gradient: Tensor) -> list[Tensor]:
    """dL/dy_t of each linear that ``block`` records, float32 ``(tokens that met it, rows)``; arguments as below."""
    inputs = hidden[None].to(block.device).detach().requires_grad_()
    with torch.enable_grad():
        result, recorded = block.run_recorded(inputs)
        met = [entry[0] for entry in recorded if entry is not None]
        found = iter(torch.autograd.grad(result, met, gradient[None].to(result)))
    return [
        hidden.new_zeros(0, module.out_features).float() if entry is None else next(found).flatten(0, -2).float()
        for module, entry in zip(block.recorded_linears, recorded, strict=True)
    ]


def block_gradients(
    block: Block,
    hidden: Tensor,
    gradient: Tensor,
    sampled_rows: Sequence[Tensor] = (),
    whole: Collection[int] = (),
) -> BlockGradients:
    """One sequence backwards through a block that is ``recording``, recomputed from its inputs.

    ``hidden`` and ``gradient`` ``(time, width)`` are the block's inputs and dL/d(outputs). ``sampled_rows``: int64, for each
    recorded linear; empty: none. ``whole``: positions among the recorded linears of those whose gradients are given back.
    """
    inputs = hidden[None].to(block.device).detach().requires_grad_()
    with torch.enable_grad():
        result, recorded = block.run_recorded(inputs)
        met = [entry for entry in recorded if entry is not None]
        gradients = torch.autograd.grad(result, [inputs, *(output for output, _ in met)], gradient[None].to(result))
    of_outputs = iter(gradients[1:])
    squares, rows, sampled, outputs = [], [], [], []
    for position, (module, entry) in enumerate(zip(block.recorded_linears, recorded, strict=True)):
        tokens = None if entry is None else entry[1]
        found = hidden.new_zeros(0, module.out_features) if entry is None else next(of_outputs)
        found = found.reshape(-1, module.out_features).float()
        if entry is None:
            tokens = torch.zeros(0, dtype=torch.int64, device=found.device)
        if position in whole:
            outputs.append(found)
        each = found.square()
        squares.append(_by_token(each.sum(-1), tokens, len(hidden)))
        rows.append(each.sum(0))
        if sampled_rows:
            sampled.append(_by_token(found[:, sampled_rows[position]], tokens, len(hidden)))
    return BlockGradients(torch.stack(squares), rows, sampled, gradients[0][0], outputs)


def _by_token(found: Tensor, tokens: Tensor | None, time: int) -> Tensor:
    """``found`` at the places of its tokens, ``(time, ...)``; 0 for tokens that did not meet the linear."""
    return found if tokens is None else found.new_zeros(time, *found.shape[1:]).index_put((tokens,), found)


def sequence_seed(seed: int, sequence: int) -> int:
    """The seed of the labels of one calibration sequence."""
    return derive_seed(seed, "fisher labels", sequence)


def normalized(weights: Tensor) -> tuple[Tensor, float]:
    """Weights ``(tokens,)`` of one linear divided by their mean, and that mean; all ones where it is zero."""
    mean = weights.double().mean()
    return torch.where(mean > 0, weights.double() / mean, 1.0).float(), float(mean)
